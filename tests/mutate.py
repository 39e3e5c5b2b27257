"""Mutation testing: which small changes of the code does no test notice?

``make mutate`` makes one small change at a time – a mutant – in the files below, runs the tests that cover the changed
line, and counts the mutants that some test notices. A survivor is either a gap in the tests or a change that changes
nothing; those are listed, with the reason, in ``equivalent_mutants.txt`` beside this script.

Existing tools mutate the bodies of functions only, or start a Python process for every mutant. Here constants of a
module and defaults of arguments count too, and every mutant runs in a fork of a process that has imported torch.

    python tests/mutate.py                                  # all files, all mutants: hours
    python tests/mutate.py monai_drdm/fields --sample 100   # a hundred of one folder, drawn at random
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import importlib.abc
import importlib.util
import json
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / ".mutation"
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.txt")
TARGETS = (
    "monai_drdm/fields",
    "monai_drdm/diffusion",
    "monai_drdm/deformation/record.py",
    "monai_drdm/deformation/stored_field.py",
    "monai_drdm/transforms/base.py",
    "monai_drdm/transforms/points.py",
    "monai_drdm/transforms/tracing.py",
    "monai_drdm/io/ddf.py",
)
TESTS = {
    "fields": ("tests/fields", "tests/diffusion", "tests/metrics"),
    "diffusion": ("tests/fields", "tests/diffusion", "tests/metrics"),
    "deformation": ("tests/transforms", "tests/bank"),
    "transforms": ("tests/transforms", "tests/bank"),
    "io": ("tests/io",),
}
"""Where the tests of a part of the package are looked for."""
PYTEST = ("-p", "no:cacheprovider", "-o", "addopts=", "--import-mode=importlib", "-q", "-m", "not long")

COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "*",
    ast.Pow: "*",
    ast.BitAnd: "|",
    ast.BitOr: "&",
}
OPPOSITES = (
    ("min", "max"),
    ("amin", "amax"),
    ("minimum", "maximum"),
    ("any", "all"),
    ("floor", "ceil"),
    ("zeros", "ones"),
    ("zeros_like", "ones_like"),
)
RENAMED = dict(OPPOSITES) | {second: first for first, second in OPPOSITES}


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    path: str
    line: int
    last_line: int
    """Of the statement around the change."""
    start: int
    """Of what is replaced, in bytes of the file."""
    end: int
    new: str
    at_import: bool
    """The line runs when the module is imported: a constant, or the default of an argument."""

    def source(self) -> bytes:
        """The whole changed file."""
        old = (ROOT / self.path).read_bytes()
        return old[: self.start] + self.new.encode() + old[self.end :]

    def key(self) -> str:
        """What the change is called, whatever moves the line: file, old code -> new code."""
        old = (ROOT / self.path).read_bytes()
        first, last = old.rfind(b"\n", 0, self.start) + 1, old.find(b"\n", self.end)
        before = old[first:last]
        after = old[first : self.start] + self.new.encode() + old[self.end : last]
        return f"{self.path}: {' '.join(before.decode().split())}  ->  {' '.join(after.decode().split())}"


class Finder(ast.NodeVisitor):
    """Finds the mutants of a file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.text = (ROOT / path).read_bytes()
        self.starts = [0]
        for line in self.text.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.statement: ast.stmt | None = None
        self.depth = 0
        self.found: list[Mutant] = []

    def add(self, start: int, end: int, new: str, at_import: bool = False) -> None:
        """Note a change of the statement at hand."""
        assert self.statement is not None
        first = self.statement.lineno
        last = self.statement.end_lineno or first
        if isinstance(self.statement, (ast.If, ast.For, ast.While, ast.With, ast.FunctionDef, ast.ClassDef)):
            last = max(first, self.statement.body[0].lineno - 1)
        self.found.append(Mutant(self.path, first, last, start, end, new, at_import or self.depth == 0))

    def begin(self, node: ast.AST) -> int:
        """Where a node begins, in bytes."""
        return self.starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]

    def end(self, node: ast.AST) -> int:
        """Where a node ends, in bytes."""
        return self.starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]

    def code(self, node: ast.AST) -> str:
        """The text of a node."""
        return self.text[self.begin(node) : self.end(node)].decode()

    def between(self, left: ast.AST, right: ast.AST, new: str) -> None:
        """Replace the operator between two operands."""
        start, end = self.end(left), self.begin(right)
        gap = self.text[start:end].decode()
        old = gap.strip().strip("()").strip()
        if "#" not in gap and old:
            at = start + len(gap[: gap.index(old)].encode())
            self.add(at, at + len(old.encode()), new)

    def visit(self, node: ast.AST) -> None:
        """Keep track of the statement that a node belongs to."""
        if isinstance(node, ast.stmt):
            outer, self.statement = self.statement, node
            super().visit(node)
            self.statement = outer
        else:
            super().visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Defaults, then the body; decorators and annotations are left alone."""
        for default in (*node.args.defaults, *(one for one in node.args.kw_defaults if one is not None)):
            before, self.depth = self.depth, 0
            self.visit(default)
            self.depth = before
        self.depth += 1
        for statement in node.body:
            self.visit(statement)
        self.depth -= 1

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """The value only."""
        if node.value is not None:
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        """Unless it names a type."""
        if (
            self.depth == 0
            and isinstance(node.value, (ast.Subscript, ast.BinOp))
            and self.code(node.value)[0].isupper()
        ):
            return
        self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        """An error that is not raised; its words are left alone."""
        self.add(self.begin(node), self.end(node), "pass")

    def visit_Assert(self, node: ast.Assert) -> None:
        """Narrows types for mypy."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Words."""

    def visit_Import(self, node: ast.Import) -> None:
        """Nothing to change."""

    visit_ImportFrom = visit_Import  # noqa: N815

    def visit_Expr(self, node: ast.Expr) -> None:
        """A call that is left out; docstrings are left alone."""
        if isinstance(node.value, ast.Call):
            self.add(self.begin(node), self.end(node), "pass")
            self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        """``a += b`` that is left out."""
        self.add(self.begin(node), self.end(node), "pass")
        self.generic_visit(node)

    def visit_Break(self, node: ast.Break) -> None:
        """A loop that goes on."""
        self.add(self.begin(node), self.end(node), "continue")

    def visit_Continue(self, node: ast.Continue) -> None:
        """A loop that ends."""
        self.add(self.begin(node), self.end(node), "break")

    def visit_If(self, node: ast.If | ast.IfExp) -> None:
        """A condition upside down, unless that is what changing its operator does."""
        if not isinstance(node.test, (ast.Compare, ast.BoolOp, ast.UnaryOp)):
            start, end = self.begin(node.test), self.end(node.test)
            self.add(start, end, f"(not ({self.code(node.test)}))")
        self.generic_visit(node)

    visit_IfExp = visit_If  # noqa: N815

    def visit_Compare(self, node: ast.Compare) -> None:
        """``<`` for ``<=``, and so on."""
        for left, operator, right in zip((node.left, *node.comparators), node.ops, node.comparators):
            self.between(left, right, COMPARISONS[type(operator)])
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        """``and`` for ``or``."""
        for left, right in zip(node.values, node.values[1:]):
            self.between(left, right, "or" if isinstance(node.op, ast.And) else "and")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        """``+`` for ``-``, and so on."""
        new = OPERATORS.get(type(node.op))
        if new is not None:
            self.between(node.left, node.right, new)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        """A sign or a ``not`` that is left out."""
        if not isinstance(node.op, ast.UAdd):
            self.add(self.begin(node), self.begin(node.operand), "")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        """Numbers a little larger, truth upside down."""
        value = node.value
        if isinstance(value, bool):
            new = str(not value)
        elif isinstance(value, int):
            new = str(value + 1)
        elif isinstance(value, float):
            new = repr(value * 1.1 if value else 1.0)
        else:
            return
        self.add(self.begin(node), self.end(node), new)

    def visit_Name(self, node: ast.Name) -> None:
        """``min`` for ``max``."""
        if node.id in RENAMED and isinstance(node.ctx, ast.Load):
            self.add(self.begin(node), self.end(node), RENAMED[node.id])

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """``.amin`` for ``.amax``."""
        if node.attr in RENAMED:
            self.add(self.end(node) - len(node.attr), self.end(node), RENAMED[node.attr])
        self.generic_visit(node)


def mutants_of(path: Path) -> list[Mutant]:
    """All mutants of a file, in the order of its text."""
    finder = Finder(str(path.relative_to(ROOT)))
    finder.visit(ast.parse(finder.text))
    return list(dict.fromkeys(finder.found))


def is_python(mutant: Mutant) -> bool:
    """Whether the changed file compiles."""
    with contextlib.suppress(SyntaxError):
        compile(mutant.source(), mutant.path, "exec")
        return True
    return False


@dataclass
class Coverage:
    """Which tests run which lines, and how long they take."""

    tests: dict[str, dict[int, list[str]]]
    """By file and line."""
    seconds: dict[str, float]

    def tests_for(self, mutant: Mutant, budget_s: float) -> list[str]:
        """Tests that cover a mutant: those of its own test file first, fast ones first, within a budget of time."""
        lines = self.tests.get(mutant.path, {})
        wanted = range(mutant.line, mutant.last_line + 1)
        covering = {test for line, tests in lines.items() if mutant.at_import or line in wanted for test in tests}
        own = f"test_{Path(mutant.path).name}"
        chosen, total = [], 0.0
        for test in sorted(covering, key=lambda one: (own not in one, self.seconds.get(one, 9.0), one)):
            seconds = self.seconds.get(test, 9.0)
            if total + seconds <= budget_s:
                chosen.append(test)
                total += seconds
        return chosen


def measure_coverage(jobs: int, folders: Sequence[str]) -> Coverage:
    """Run tests once with coverage by test; kept in ``.mutation`` until a file of the code or of the tests changes."""
    WORK.mkdir(exist_ok=True)
    digest = hashlib.sha256(repr(folders).encode())
    for folder in ("monai_drdm", *folders):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    report, data = WORK / f"{digest.hexdigest()[:16]}.xml", WORK / f"{digest.hexdigest()[:16]}.coverage"
    if not report.is_file():
        options = ["--cov=monai_drdm", "--cov-context=test", "--cov-report=", f"--junitxml={report}.part"]
        command = [sys.executable, "-m", "pytest", *PYTEST, "-n", str(jobs), *options, *folders]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "COVERAGE_FILE": str(data)}, check=True)
        Path(f"{report}.part").replace(report)
    tests: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    with contextlib.closing(sqlite3.connect(data)) as connection:
        rows = connection.execute(
            "select file.path, context.context, arc.fromno, arc.tono from arc "
            "join file on file.id = arc.file_id join context on context.id = arc.context_id"
        )
        for path, context, *numbers in rows:
            name = context.rpartition("|")[0]
            if name:
                for line in numbers:
                    if line > 0:
                        tests[path][line].append(name)
    seconds = {}
    for case in ElementTree.parse(report).iter("testcase"):  # our own file
        folder = case.get("classname", "").replace(".", "/")
        seconds[f"{folder}.py::{case.get('name')}"] = float(case.get("time", 0))
    return Coverage(tests, seconds)


class MutantLoader(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports the changed file in place of the original."""

    def __init__(self, mutant: Mutant) -> None:
        self.path = ROOT / mutant.path
        self.code = mutant.source()
        self.name = mutant.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> object:
        """Answer for one module only."""
        if fullname != self.name:
            return None
        package = self.path.name == "__init__.py"
        spec = importlib.util.spec_from_loader(fullname, self, origin=str(self.path), is_package=package)
        if spec is not None:
            spec.has_location = True
        return spec

    def get_source(self, fullname: str) -> str:
        """The changed text."""
        return self.code.decode()

    def get_code(self, fullname: str) -> object:  # type: ignore[override]
        """Compiled under the name of the original, which tracebacks show."""
        return compile(self.code, str(self.path), "exec")


def run_in_fork(mutant: Mutant, tests: Sequence[str], limit_s: float) -> int:
    """Start the tests of a mutant in a child process; its process id. It exits with 0 if no test failed."""
    child = os.fork()
    if child:
        return child
    code = 9
    try:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit_s), int(limit_s) + 5))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(6 * limit_s))
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        sys.meta_path.insert(0, MutantLoader(mutant))
        import pytest

        code = int(pytest.main([*PYTEST, "-x", "-p", "no:xdist", "-p", "no:cov", *tests]))
    finally:
        os._exit(code)


def judge(
    mutants: Sequence[Mutant], coverage: Mapping[str, Coverage], jobs: int, budget_s: float
) -> Iterator[tuple[Mutant, str]]:
    """Each mutant with ``killed``, ``survived``, or ``uncovered`` where no test runs its line."""
    running: dict[int, tuple[Mutant, int]] = {}
    waiting = list(reversed(mutants))
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            if not is_python(mutant):
                continue
            covering = coverage[Path(mutant.path).parts[1]]
            tests = covering.tests_for(mutant, budget_s)
            expected_s = sum(covering.seconds.get(test, 0.0) for test in tests)
            if tests:
                running[run_in_fork(mutant, tests, 10 + 3 * expected_s)] = mutant, len(tests)
            else:
                yield mutant, "uncovered"
        pid, status = os.wait()
        if pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # what the tests left running
            mutant, _ = running.pop(pid)
            yield mutant, "survived" if status == 0 else "killed"


def equivalent() -> dict[str, str]:
    """Mutants known to change nothing, with the reason: lines of ``key`` and, below, two spaces and the reason."""
    known, key = {}, ""
    for line in EQUIVALENT.read_text(encoding="utf-8").splitlines() if EQUIVALENT.is_file() else []:
        if line.startswith("  "):
            known[key] = f"{known.get(key, '')} {line.strip()}".strip()
        elif line and not line.startswith("#"):
            key = line
    return known


def warm_up() -> None:
    """Import what the tests import, but nothing of this package, so that every fork has it."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import hypothesis  # noqa: F401
    import monai.data
    import monai.networks.blocks
    import monai.transforms  # noqa: F401
    import nibabel  # noqa: F401
    import pytest  # noqa: F401
    import scipy.ndimage
    import scipy.stats  # noqa: F401
    import SimpleITK  # noqa: F401
    import torch

    torch.set_num_threads(1)


def report(rows: Sequence[dict[str, object]], known: dict[str, str], tell: Callable[[str], object] = print) -> float:
    """Print the score by file and every survivor; the score of what is not known to be equivalent."""
    by_file: dict[str, list[dict[str, object]]] = defaultdict(list)
    for row in rows:
        by_file[str(row["path"])].append(row)
    tell(f"{'file':44} {'mutants':>8} {'killed':>7} {'equivalent':>11} {'survived':>9} {'score':>7}")
    totals = [0, 0, 0]
    for path, ones in [*sorted(by_file.items()), ("all", list(rows))]:
        killed = sum(one["verdict"] == "killed" for one in ones)
        same = sum(one["verdict"] != "killed" and one["key"] in known for one in ones)
        totals = [len(ones), killed, same]
        score = killed / max(len(ones) - same, 1)
        tell(f"{path:44} {len(ones):8} {killed:7} {same:11} {len(ones) - killed - same:9} {score:7.1%}")
    for row in rows:
        if row["verdict"] != "killed" and row["key"] not in known:
            tell(f"{row['verdict']:9} line {row['line']:4}  {row['key']}")
    return totals[1] / max(totals[0] - totals[2], 1)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", default=TARGETS, help="files and folders to change")
    parser.add_argument("--sample", type=int, help="so many mutants, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of that draw")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--budget", type=float, default=15.0, help="seconds of tests for a mutant")
    parser.add_argument("--minimum", type=float, default=0.9, help="score below which this fails")
    parser.add_argument("--again", action="store_true", help="only mutants that survived the last time")
    options = parser.parse_args()
    files = [file for path in options.paths for file in sorted([Path(ROOT / path), *Path(ROOT / path).rglob("*.py")])]
    mutants = [one for file in files if file.suffix == ".py" for one in mutants_of(file)]
    if options.sample is not None and options.sample < len(mutants):
        mutants = sorted(
            random.Random(options.seed).sample(mutants, options.sample),
            key=lambda one: (one.path, one.start),
        )
    os.chdir(ROOT)
    parts = sorted({Path(one.path).parts[1] for one in mutants})
    groups = sorted({TESTS[part] for part in parts})
    coverages = {group: measure_coverage(options.jobs, group) for group in groups}
    coverage = {part: coverages[TESTS[part]] for part in parts}
    results = WORK / "results.jsonl"
    if options.again:
        last = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
        alive = {one["key"] for one in last if one["verdict"] != "killed"}
        mutants = [one for one in mutants if one.key() in alive]
    warm_up()
    rows, started = [], time.monotonic()
    with results.open("w", encoding="utf-8") as file:
        for number, (mutant, verdict) in enumerate(judge(mutants, coverage, options.jobs, options.budget), 1):
            rows.append({**asdict(mutant), "key": mutant.key(), "verdict": verdict})
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
            seconds = time.monotonic() - started
            print(f"\r{number} of {len(mutants)} mutants, {seconds:.0f} s", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    score = report(rows, equivalent())
    print(f"score {score:.1%} of {len(rows)} mutants, equivalent ones left out")
    return 0 if score >= options.minimum else 1


if __name__ == "__main__":
    sys.exit(main())
