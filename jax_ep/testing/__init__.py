"""Tools for testing on top of jax_ep: what every back end must do, and what that is made of.

`conformance` holds the checks; `cases` one problem in both ways, on a group and by the reference;
`routing` named routings; `compare` and `ranks` comparison and placement for programs of one or
several processes; `launch` starts such programs; `virtual_devices` makes several devices of a CPU.
"""

from jax_ep.testing.ranks import virtual_devices as virtual_devices
