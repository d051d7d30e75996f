"""Tools for tests of jax_ep and of programs on top of it.

`conformance` holds the checks that every back end must pass. `cases` computes one problem on a
group and by the reference. `routing` holds named routings. `compare` and `ranks` compare and place
arrays in programs of one or several processes. `launch` starts programs of several processes.
`clock` reads a device's clock in the middle of a program, and makes a rank late.
`virtual_devices` gives a program several CPU devices.
"""

from jax_ep.testing.ranks import virtual_devices as virtual_devices
