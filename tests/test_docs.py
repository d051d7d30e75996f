"""What the documents show runs, and their links lead somewhere."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep

ROOT = Path(__file__).parent.parent
PAGES = sorted(p for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def test_readme_layer_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {"jax": jax, "jnp": jnp, "P": P, "jax_ep": jax_ep}
    exec("\n".join(blocks), names)
    names["group"].check()
    names["group"].close()
    assert capsys.readouterr().out == "(512, 32)\n"
    assert len(blocks[0].splitlines()) <= 10


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
