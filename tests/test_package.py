"""The wheel: what it installs, and its command and functions where nothing of this repository is."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from moe_impls import kernel_file
from moe_impls.registry import IMPLEMENTATIONS, PEERS
from reporting.provenance import ROOT, git_commit

RIGHT = "from moe_impls.sorted_dispatch import forward\n"
WRONG = """
from moe_impls.sorted_dispatch import forward as right


def forward(x, routing, experts, *, combine="sum"):
    return right(x, routing, experts, combine=combine) * 1.1
"""
# The wheel is built once, with its kernels.
pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("package")]
ONE = "values-aligned-float32"  # the name of one test of an implementation


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "build", "--no-isolation", f"--outdir={folder}", ROOT)
    subprocess.run(build, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def environment(folder: Path, wheel: Path, *, with_packages: bool) -> Path:
    """A virtual environment that has the wheel alone, or with it what this one has."""
    venv.create(folder)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", f"--python={python}", "install", "--quiet", "--no-deps", "--no-index")
    subprocess.run([*pip, wheel], check=True)
    if with_packages:
        (_packages(folder) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder


def _packages(environment: Path) -> Path:
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(environment)}))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("env") / "env", wheel, with_packages=True)


def run(environment: Path, folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command of the environment, in a folder, with what a shell there has."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    path = {"PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=kept | path | variables, capture_output=True, text=True,
    )  # fmt: skip


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts and path.is_file()}


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A folder of somebody else, whose packages, settings and conftest files have the suite's names."""
    for name in ("benchmarks", "correctness", "reporting"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"OWNER = 'theirs, {name}'\n", encoding="utf-8")
    (tmp_path / "kernel.py").write_text(
        "from benchmarks import OWNER as one\nfrom correctness import OWNER as two\n"
        f"import reporting\nassert (one + two + reporting.OWNER).count('theirs') == 3\n{RIGHT}",
        encoding="utf-8",
    )
    (tmp_path / "wrong.py").write_text(WRONG, encoding="utf-8")
    (tmp_path / "conftest.py").write_text("raise SystemExit('their conftest.py was imported')\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --not-an-option\n", encoding="utf-8")
    return tmp_path


def test_only_the_package_and_its_command_are_installed(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"moe_impls", wheel.name.split("-py3")[0] + ".dist-info"}
    inside = {match[1] for name in names if (match := re.match(r"moe_impls/_suite/(\w+)/", name))}
    assert inside == {"correctness", "benchmarks", "reporting"}
    assert "moe_impls/_suite/correctness/session/verdict.schema.json" in names
    commit = zipfile.ZipFile(wheel).read("moe_impls/_suite/commit").decode().strip()
    assert commit == git_commit()


USES_NATIVE = """
import torch
from moe_impls import kernel_file, kernel_library, native
from moe_impls.processor import instructions
from moe_impls.registry import resolve
from moe_impls.testing import make_inputs, Problem

assert kernel_library.PACKAGED.parent == kernel_file.SOURCE.parent.parent
assert native.is_available(), kernel_library.missing()
here = instructions()
for name, level in kernel_file.LEVELS.items():
    if level.needed <= here:
        found = kernel_library._whole(kernel_library.PACKAGED / f"{name}.so")
        kernel_library.library = lambda: found
        for dtype in native.SUPPORT.dtypes:  # of whole numbers, so that every right result is the same
            sizes = {"T": 40, "D": 37, "H": 11, "O": 9, "E": 5, "K": 2}
            x, routing, experts, _ = make_inputs(Problem("exact", **sizes, dtype=dtype, exact=True))
            want = resolve("sorted_dispatch").forward(x, routing, experts)
            assert torch.equal(native.forward(x, routing, experts), want), (name, dtype)
            leaves = [t.requires_grad_() for t in (x, routing.gates, *experts.tensors.values())]
            of_native, of_other = (
                torch.autograd.grad(forward(x, routing, experts).sum(), leaves)
                for forward in (native.forward, resolve("sorted_dispatch").forward)
            )
            assert all(map(torch.equal, of_native, of_other)), (name, dtype)
        print(name)
"""


def test_the_wheel_has_a_kernel_for_each_kind_of_processor_and_needs_no_compiler(
    installed: Path, wheel: Path, tmp_path: Path
) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if "_native/" in name}
    levels = [name for name, level in kernel_file.LEVELS.items() if level.machine == platform.machine()]
    assert names == {f"moe_impls/_native/{level}.so" for level in levels}
    assert wheel.name.endswith(f"-py3-none-linux_{platform.machine()}.whl")
    nothing = {"CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    done = run(installed, tmp_path, "python", "-W", "error::UserWarning", "-c", USES_NATIVE, **nothing)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == levels[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_without_a_compiler_is_one_for_any_system(tmp_path: Path) -> None:
    build = (sys.executable, "-m", "build", "--no-isolation", "--wheel", f"--outdir={tmp_path}", ROOT)
    done = subprocess.run(build, env=os.environ | {"CXX": "no-such-compiler"}, capture_output=True, text=True)
    assert done.returncode == 0 and "no-such-compiler is not there" in done.stdout + done.stderr
    (path,) = tmp_path.glob("*.whl")
    assert path.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(path).namelist() if "_native/" in name]


def test_a_file_is_verified_whatever_lies_around_it(installed: Path, theirs: Path) -> None:
    before = files(installed)
    done = run(
        installed, theirs, *("moe-impls", "verify", "-k", ONE, "kernel.py:forward", "--verdict=out/v.json"),
        PYTEST_ADDOPTS="--nor-this", PYTEST_PLUGINS="not_there", PYTHONPATH=".",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    first, *_ = lines = done.stdout.splitlines()
    assert first.startswith("moe-impls 0.1.0 (commit ") and first.endswith(f"of {_packages(installed)}")
    assert any(line.startswith("implementation kernel.py:forward: ") for line in lines)
    assert lines[-1] == "verdict: out/v.json and out/v.md"
    assert files(installed) == before


def test_the_command_finds_what_the_checkout_finds(installed: Path, theirs: Path) -> None:
    kernel = f"{theirs / 'wrong.py'}:forward"
    arguments = (kernel, f"--router={theirs / 'router.py'}:route", "-k", f"{ONE} or ties-mixtral")
    (theirs / "router.py").write_text("from moe_impls.router import route\n", encoding="utf-8")
    done = run(installed, theirs, "moe-impls", "verify", *arguments, "--verdict=a.json", "-n1")
    assert done.returncode == 1, done.stdout + done.stderr
    pytest_there = [sys.executable, "-m", "pytest", "correctness", "-p", "no:cacheprovider"]
    command = [*pytest_there, f"--impl={kernel}", *arguments[1:], f"--verdict={theirs / 'b.json'}"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 1
    by_command, by_pytest = (json.loads((theirs / f"{name}.json").read_text()) for name in "ab")
    assert by_command["subjects"][0]["findings"]
    for subject in (*by_command["subjects"], *by_pytest["subjects"]):
        subject["source"].pop("file")  # relative to the folder
        for finding in subject["findings"]:  # what each worker looks for once, as long as there is time
            finding["message"] = finding["message"].partition("  smallest failing case: ")[0].strip()
    assert by_command["subjects"] == by_pytest["subjects"]


def test_what_kills_an_isolated_run_is_a_finding_in_the_verdict(installed: Path, theirs: Path) -> None:
    crash = "import ctypes\n\n\ndef forward(x, routing, experts, *, combine):\n    ctypes.string_at(0)\n"
    (theirs / "crash.py").write_text(crash, encoding="utf-8")
    command = ("moe-impls", "verify", "crash.py:forward", "--isolate", "-k", ONE, "--verdict=v.json")
    done = run(installed, theirs, *command)
    assert done.returncode == 1, done.stdout + done.stderr
    found = json.loads((theirs / "v.json").read_text(encoding="utf-8"))
    assert (found["outcome"], found["complete"]) == ("wrong", True)
    assert "it ended its process by SIGSEGV" in found["subjects"][0]["findings"][0]["message"]


def test_a_file_is_measured_and_the_results_lie_beside_it(installed: Path, theirs: Path) -> None:
    before = files(installed)
    cell = ("--T=16", "--D=8", "--H=8", "--E=4", "--K=2", "--mode=forward", "--seconds=0.01")
    done = run(installed, theirs, "moe-impls", "bench", "kernel.py:forward", "--impl=index_add", *cell)
    assert done.returncode == 0, done.stdout + done.stderr
    (csv,) = theirs.glob("moe-impls-results/*/*.csv")
    assert len(csv.read_text(encoding="utf-8").splitlines()) == 3
    assert (csv.parent / "report.md").is_file()
    assert files(installed) == before


def test_two_implementations_are_compared(installed: Path, theirs: Path) -> None:
    command = ("compare", "index_add", "kernel.py:forward", "--T=16", "--mode=forward", "--seconds=0.05")
    done = run(installed, theirs, "moe-impls", *command, "--csv=out.csv")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kernel.py:forward, relative to index_add" in done.stdout
    assert (theirs / "out.csv").is_file()


def test_list_names_everything_with_its_meaning(installed: Path, theirs: Path) -> None:
    done = run(installed, theirs, "moe-impls", "list")
    assert done.returncode == 0, done.stderr
    listed = dict(re.findall(r"^  (\S+)  +(\S.*)$", done.stdout, re.MULTILINE))
    assert set(listed) >= {*IMPLEMENTATIONS, *PEERS, "mixtral-8x7b", "values", "ties", "router_gradient"}
    assert not re.search(r"^  \S+$", done.stdout, re.MULTILINE)  # each has a meaning


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        ("verify nowhere.py:forward", 4, "nowhere.py does not exist or is no file"),
        ("verify --verdict=kernel.py/v.json", 4, "kernel.py/v.json cannot be written"),
        ("bench kernel.py:forward --out=kernel.py/out", 4, "cannot be written"),
        ("list --peers", 2, "list takes no arguments; --peers is given"),
        ("gate --base main", 2, "gate needs a checkout of the repository: python -m benchmarks gate"),
        ("history plot", 2, "history needs a checkout"),
        ("cuda", 2, "cuda needs a checkout"),
        ("measurement", 2, "measurement needs a checkout"),
        ("compare --base main", 2, "--base needs a checkout of the repository"),
        ("report", 2, "moe-impls-results holds no folder of a sweep; `moe-impls bench` makes them"),
        ("measure", 2, "unknown command 'measure'; valid are verify, bench, list, compare"),
    ],
)
def test_a_bad_request_is_one_line(
    command: str, status: int, message: str, installed: Path, theirs: Path
) -> None:
    done = run(installed, theirs, "moe-impls", *command.split())
    (line,) = filter(None, done.stderr.splitlines())
    assert line.lower().startswith("error: ") and message in line
    assert done.returncode == status


@pytest.fixture(scope="session")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("bare") / "env", wheel, with_packages=False)


@pytest.mark.parametrize(
    ("command", "status"), [("verify", 4), ("bench", 4), ("compare", 2), ("list", 2), ("profile", 2)]
)
def test_without_the_extra_each_command_names_it(
    command: str, status: int, bare: Path, tmp_path: Path
) -> None:
    done = run(bare, tmp_path, "moe-impls", command)
    (line,) = filter(None, done.stderr.splitlines())
    assert re.match(rf"(?i)error: {command} needs filelock, hypothesis, ", line)
    assert line.endswith(": pip install 'moe-impls[suite]'")
    assert done.returncode == status


def test_help_needs_no_other_package(bare: Path, tmp_path: Path) -> None:
    done = run(bare, tmp_path, "moe-impls", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "verify [NAME ...]" in done.stdout and "\n  compare " in done.stdout


@pytest.mark.parametrize(
    ("command", "says", "does_not"),
    [
        ("verify", ("--router", "--verdict", "all of the project's own", "`pytest --help`"), "--exitfirst"),
        ("bench", ("--grid", "moe-impls-results/<machine>", "example: ", "`pytest --help`"), "--exitfirst"),
        ("compare", ("usage: moe-impls compare",), "python -m"),
        ("report", ("usage: moe-impls report", "moe-impls-results/"), " results/"),
        ("list", ("usage: moe-impls list",), "mixtral"),
    ],
)
def test_help_of_a_command_is_short_and_its_own(
    command: str, says: tuple[str, ...], does_not: str, installed: Path, tmp_path: Path
) -> None:
    done = run(installed, tmp_path, "moe-impls", command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    told = re.sub(r"-\n +", "-", done.stdout)
    assert [words for words in says if words not in told] == [] and does_not not in told
    assert len(done.stdout.splitlines()) < 70


def test_beside_a_checkout_the_first_line_says_which_one_runs(bare: Path, tmp_path: Path) -> None:
    (tmp_path / "moe_impls").mkdir()
    done = run(bare, tmp_path, "moe-impls", "--version")
    assert done.stdout.endswith(f" of {_packages(bare)}, not the one in this folder\n")
    assert "not the one" not in run(bare, bare, "moe-impls", "--version").stdout


THEIR_TESTS = """
import correctness
import pytest
import torch
from kernel import forward
from wrong import forward as wrong
from moe_impls import Experts, LayerWeights, MoE, Support
from moe_impls.router import route
from moe_impls.testing import *
from moe_impls.testing import Verified, verify_layer, verify_router


def test_right():
    found = verify(forward, support=Support(dtypes=(torch.float32,)))
    assert found.name == "moe_impls.sorted_dispatch:forward" and found.checks > 30 and found.worst["y"] <= 1
    assert not torch.is_inference_mode_enabled()


def test_wrong():
    with pytest.raises(AssertionError, match="wrong:forward fails 'after_inference'") as caught:
        verify(wrong)
    code = str(caught.value).partition("reproduce: ")[2].partition(chr(10))[0]
    with pytest.raises(AssertionError, match="wrong:forward fails 'after_inference'"):
        exec(code)
    x, routing, experts, dy = make_inputs(Problem("small", T=9, D=4, H=4, O=4, E=3, K=2))
    assert x.shape[0] == dy.shape[0]


def test_router():
    assert verify_router(route).checks > 10
    with pytest.raises(AssertionError, match="gates"):
        verify_router(lambda logits, spec, *, selection_bias=None: half(logits, spec, selection_bias))


def half(logits, spec, selection_bias):
    routing = route(logits, spec, selection_bias=selection_bias)
    return routing._replace(gates=routing.gates / 2)


def make():
    return MoE(input_size=12, output_size=7, num_experts=6, hidden_size=10, k=2)


def read(layer):
    return LayerWeights(layer.experts, layer.router, layer.w_gate.T, training_only=("w_noise",))


def test_losses_and_layers_are_run_again_by_their_words():
    rerun("losses", "moe_impls", "counts_visits")
    rerun("layer", "moe_qwen", "evaluation", "float32")
    with pytest.raises(ValueError, match="has no check 'ties'"):
        rerun("layer", "moe_qwen", "ties", "float32")


def test_layer():
    assert verify_layer(make, read).checks > 10
    with pytest.raises(AssertionError, match="training_only"):
        verify_layer(make, lambda layer: read(layer)._replace(training_only=()))


def test_nothing_can_be_checked():
    with pytest.raises(ValueError, match="nothing that it declares in SUPPORT can be checked"):
        verify(forward, support=Support(devices=("cuda",)))
    with pytest.raises(ValueError, match="it must take"):
        verify(lambda x: x)


def test_their_packages_are_still_theirs():
    import benchmarks
    assert "theirs" in correctness.OWNER + benchmarks.OWNER
"""


def test_other_projects_call_it_in_tests_of_their_own(installed: Path, theirs: Path) -> None:
    (theirs / "conftest.py").unlink()
    (theirs / "pytest.ini").unlink()
    (theirs / "test_theirs.py").write_text(THEIR_TESTS, encoding="utf-8")
    done = run(installed, theirs, "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_theirs.py")
    assert done.returncode == 0, done.stdout
    assert "7 passed" in done.stdout


def test_the_action_writes_the_verdict_to_the_summary(installed: Path, wheel: Path, theirs: Path) -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    given = {
        "subject": "wrong.py:forward",
        "options": f"-k '{ONE} or nothing'",
        "version": f"moe-impls[suite] @ {wheel.as_uri()}",
    }
    inputs = {name: given.get(name, about.get("default", "")) for name, about in action["inputs"].items()}
    written = {name: theirs / name for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    # What is not installed here is no matter of the action.
    variables = {"PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    variables |= {name: str(path) for name, path in written.items()} | {"GITHUB_ACTION_PATH": str(ROOT)}
    statuses = {}
    for step in action["runs"]["steps"]:
        if "run" in step:
            expanded = {
                name: re.sub(r"\$\{\{ inputs\.(\S+) \}\}", lambda match: str(inputs[match[1]]), value)
                for name, value in step["env"].items()
            }
            script = theirs / "step.sh"
            script.write_text(step["run"], encoding="utf-8")
            bash = ("bash", "--noprofile", "--norc", "-eo", "pipefail", str(script))
            statuses[step["name"]] = run(installed, theirs, *bash, **variables, **expanded)
    codes = {name: done.returncode for name, done in statuses.items()}
    assert codes == {"Install moe-impls": 0, "Verify": 1, "Write the summary": 0}, statuses
    summary = written["GITHUB_STEP_SUMMARY"].read_text(encoding="utf-8")
    assert summary.startswith("# `wrong.py:forward`: **wrong**")
    assert f"-k '{ONE} or nothing'" in summary
    assert written["GITHUB_OUTPUT"].read_text(encoding="utf-8") == "outcome=wrong\n"
