"""What the suite says of public layers: ``python -m evidence layers``, results/layers.csv and its page.

It reads what is installed, and installs nothing: a package that is not there is left as the table has it, or
without a verdict.
"""

from __future__ import annotations

import importlib.metadata
from typing import NamedTuple

import pandas as pd

from correctness.session.layer_subject import resolve_layer
from evidence import tables, verdicts
from moe_impls.registry import ResolveError
from reporting import provenance
from reporting.pages import markdown_table, write_atomically

CSV = tables.RESULTS / "layers.csv"
PAGE = CSV.with_suffix(".md")
FOLDER = "evidence/layers"
NOT_INSTALLED = "not installed"


class Public(NamedTuple):
    """A public layer: the distribution, its reading, and what is known of it.

    cause: what the suite's findings come from, or why the contract cannot say it.
    reproduction: a script beside the readings that shows it without this project.
    """

    package: str
    layer: str
    cause: str = ""
    reproduction: str = ""


MASKED = "tokens are gathered by a product with a mask: NaN times zero reaches the other tokens of a sequence"
LAYERS = (
    Public(
        "transformers",
        "from_transformers.py:nllb",
        "the mask [T, E] of the best experts is taken for expert ids: only experts 0 and 1 are used",
        "nllb_two_experts.py",
    ),
    Public(
        "transformers",
        "from_transformers.py:longcat_router_bias",
        "router_bias=True makes a bias that the router never reads",
        "longcat_router_bias.py",
    ),
    Public(
        "transformers",
        "from_transformers.py:mixtral_jitter",
        "router_jitter_noise > 0 writes the noise into the caller's x in training",
        "jitter_writes_to_x.py",
    ),
    Public(
        "transformers",
        "from_transformers.py:minimax_jitter",
        "router_jitter_noise > 0 writes the noise into the caller's x in training",
        "jitter_writes_to_x.py",
    ),
    Public("litgpt", "from_litgpt.py:mixtral"),
    Public(
        "litgpt",
        "from_litgpt.py:deepseek_v3",
        "experts of other groups have the score 0, not minus infinity: negative biases choose them",
        "litgpt_groups.py",
    ),
    Public(
        "torchtitan",
        "from_torchtitan.py:deepseek_v3",
        "experts multiply in bfloat16 whatever the dtype of x is, so that bfloat16 alone is declared",
    ),
    Public(
        "mixture-of-experts",
        "from_mixture_of_experts.py:defaults",
        "by default the second expert is left out at random in evaluation, too",
    ),
    Public("mixture-of-experts", "from_mixture_of_experts.py:every_second_expert", MASKED),
    Public(
        "st-moe-pytorch",
        "from_st_moe_pytorch.py:defaults",
        "by default the second expert is left out at random in evaluation, too",
    ),
    Public(
        "st-moe-pytorch",
        "from_st_moe_pytorch.py:straight_through",
        "by design gradients flow through the dispatch mask, too, and are not those of y",
    ),
    Public("st-moe-pytorch", "from_st_moe_pytorch.py:every_second_expert", MASKED),
)
# Layers that are no subject, with the reason.
REFUSED = {
    "fairscale MOELayer": "the second expert is drawn with Gumbel noise in evaluation, too",
    "soft-moe-pytorch SoftMoE": "soft slots mix all tokens: no token visits an expert of its own",
    "megablocks": "its layers need CUDA",
}


def run() -> int:
    """Judge every public layer that is installed; 0, whatever is found. A minute on two CPUs."""
    of = made_of()
    frame = tables.write(CSV, tables.make(CSV, of, [public.layer for public in LAYERS], work, 1), of)
    write_atomically(PAGE, page().encode())
    print(f"{frame['verdict'].value_counts().to_string()}\n{CSV}\n{PAGE}")
    return 0


def work(layer: str) -> tables.Rows:
    """Make the line of one layer."""
    public = next(p for p in LAYERS if p.layer == layer)
    version = installed(public.package)
    head = {"package": public.package, "version": version, "layer": layer}
    if not version:
        return [head | {"verdict": NOT_INSTALLED, "findings": f"pip install {public.package}"}]
    name = f"{FOLDER}/{layer}"
    try:
        return [head | verdicts.verdict(name, resolve_layer(name).tested)]
    except ResolveError as error:
        return [head | verdicts.refused(str(error))]


def installed(package: str) -> str:
    """Return the version of a distribution that is installed; empty if it is not."""
    found = list(importlib.metadata.distributions(name=package))
    return found[0].version if found else ""


def made_of() -> dict[str, str]:
    """List the layers, the versions of their packages, and the files that read and judge them."""
    folder = provenance.ROOT / FOLDER
    files = [*folder.glob("*.py"), provenance.ROOT / "evidence" / "verdicts.py"]
    layers = {f"layer {public.layer}": installed(public.package) for public in LAYERS}
    return layers | tables.files(*files) | tables.judges()


def page() -> str:
    """Write out the page of the committed table."""
    frame = tables.read(CSV)
    known = {public.layer: public for public in LAYERS}
    shown = frame[["package", "version", "layer", "verdict"]].assign(
        failing=frame["failing"],
        cause=[known[layer].cause if layer in known else "" for layer in frame["layer"]],
        reproduction=[_link(known[layer].reproduction) if layer in known else "" for layer in frame["layer"]],
    )
    refused = pd.DataFrame({"layer": list(REFUSED), "reason": list(REFUSED.values())})
    return f"""# Public layers

What the suite says of layers as their packages have them, with the cause where it finds fault, and the
smallest script that shows it without this project. The families of transformers are in
[families.md](families.md).

The table was {tables.made_at(frame)}, by `python -m evidence layers`. All of it, with every finding:
[{CSV.name}]({CSV.name}). The readings are in `{FOLDER}`;
sizes are small, and capacities so large that no token is dropped.

{markdown_table(shown)}

## No subjects

{markdown_table(refused)}
"""


def _link(script: str) -> str:
    return f"[{script}](../{FOLDER}/reproductions/{script})" if script else ""
