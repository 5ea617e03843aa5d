"""The registry, the checks for every operation, the table of resources: on a toy operation, then on the real ones."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy_operation
from toy_operation import PythonBackend

from ds4.errors import Ds4Error
from ds4.kernels import bandwidth, cuda_backend, registry, resources
from ds4.kernels.arch import ARCHITECTURES
from ds4.kernels.cases import Close, Exact, difference
from ds4.kernels.compiler import nvrtc_version
from ds4.kernels.cubin_cache import CubinCache
from ds4.kernels.entry import KERNEL_ROOT, macro_definitions
from ds4.kernels.probe import PROBE
from ds4.kernels.registry import FAMILIES, all_operations, device_of, run
from ds4.kernels.signature import check_entry, kernel_signatures, read_source
from ds4.kernels.verify import check_launches, check_tokens, n_tokens, take_tokens

CPU = torch.device("cpu")
OPERATIONS = all_operations()
SHIPPED = resources.shipped(OPERATIONS)
SAMPLES = resources.samples(OPERATIONS)  # compiled here; scripts/kernel_resources.py compiles all


@pytest.fixture
def toy(tmp_path):
    return toy_operation.operation(tmp_path)


@pytest.fixture
def case(toy):
    return toy.cases()[0]


# The registry


def test_registering(toy, monkeypatch):
    monkeypatch.setattr(registry, "_operations", {})
    monkeypatch.setattr(registry, "FAMILIES", ())
    assert registry.register(toy) is toy
    assert all_operations() == [toy]
    assert registry.get("toy") is toy
    with pytest.raises(ValueError, match="toy is registered twice"):
        registry.register(toy)
    with pytest.raises(ValueError, match="no operation joy; there are: toy"):
        registry.get("joy")


def test_on_the_cpu_the_reference_runs_and_state_is_updated_in_place(toy, case, monkeypatch):
    monkeypatch.setattr(cuda_backend, "backend_for", lambda device: pytest.fail("a kernel was wanted"))
    inputs = case.make(0, CPU)
    total, want = inputs["total"], toy.reference(case.make(0, CPU))
    results = run(toy, inputs)
    assert torch.equal(results["y"], want["y"])
    assert results["total"] is total
    assert torch.equal(total, want["total"])


def test_on_cuda_the_kernels_run_and_never_the_reference(toy, case, monkeypatch):
    backend = PythonBackend()
    monkeypatch.setattr(registry, "device_of", lambda inputs: torch.device("cuda", 0))
    monkeypatch.setattr(cuda_backend, "backend_for", lambda device: backend)
    toy = replace(toy, reference=lambda inputs: pytest.fail("the reference was run"))
    results = run(toy, case.make(0, CPU))
    assert backend.n_runs == 1
    assert set(results) == {"y", "total"}


def test_a_missing_driver_is_an_error_and_no_fallback(toy, case, monkeypatch):
    def no_driver(device):
        raise Ds4Error("no NVIDIA driver found")

    monkeypatch.setattr(registry, "device_of", lambda inputs: torch.device("cuda", 0))
    monkeypatch.setattr(cuda_backend, "backend_for", no_driver)
    with pytest.raises(Ds4Error, match="no NVIDIA driver"):
        run(toy, case.make(0, CPU))


def test_devices_of_inputs(toy):
    assert device_of({"x": torch.zeros(1), "n": 3}) == CPU
    with pytest.raises(ValueError, match="on cpu, meta: one is needed"):
        device_of({"x": torch.zeros(1), "y": torch.zeros(1, device="meta")})
    with pytest.raises(ValueError, match="no device"):
        device_of({"n": 3})
    with pytest.raises(ValueError, match="toy: tensors on meta; cpu or cuda"):
        run(toy, {"x": torch.zeros(1, device="meta")})


# Comparisons


@pytest.mark.parametrize(
    ("got", "want", "same"),
    [
        (1.0, 1.0, True),
        (0.0, -0.0, False),
        (float("nan"), float("nan"), True),
        (struct.unpack("<f", b"\x01\x00\xc0\x7f")[0], float("nan"), False),
        (1.0, 1.0000001, False),
    ],
)
def test_exact_means_every_bit(got, want, same):
    text = difference(torch.tensor([0.0, got]), torch.tensor([0.0, want]), Exact())
    assert (text is None) == same
    assert same or "1 of 2 differ, worst at [1]" in text


@pytest.mark.parametrize(
    ("got", "want", "same"),
    [
        (10.0, 10.1, True),
        (10.0, 10.2, False),
        (0.0, 0.01, True),
        (float("nan"), float("nan"), True),
        (float("nan"), 1.0, False),
        (1.0, float("nan"), False),
        (float("inf"), float("inf"), True),
        (float("inf"), float("-inf"), False),
        (1.0, float("inf"), False),
    ],
)
def test_close_has_an_absolute_and_a_relative_part(got, want, same):
    compare = Close(abs_tol=0.01, rel_tol=0.01, reason="test")
    assert (difference(torch.tensor([got]), torch.tensor([want]), compare) is None) == same


def test_what_the_reference_leaves_open_is_not_compared():
    compare = Close(0.1, 0, "test", open_where_nan=True)
    got, want = torch.tensor([1.0, 5.0, float("nan")]), torch.tensor([1.0, float("nan"), 2.0])
    assert difference(got[:2], want[:2], compare) is None
    assert difference(got, want, compare).startswith("1 of 3 differ, worst at [2]")


def test_other_shapes_and_dtypes_differ():
    assert "float32 [3] instead of torch.float32 [4]" in difference(torch.zeros(3), torch.zeros(4), Exact())
    assert "float16" in difference(torch.zeros(3), torch.zeros(3, dtype=torch.float16), Close(1, 1, "test"))
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.int64, torch.bool):
        assert difference(torch.zeros(3).to(dtype), torch.zeros(3).to(dtype), Exact()) is None
        assert difference(torch.ones(3).to(dtype), torch.zeros(3).to(dtype), Exact()).startswith("3 of 3 differ")


def test_a_tolerance_needs_a_reason():
    with pytest.raises(ValueError, match="reason"):
        Close(0.1, 0.1, "")


# The checks, each of which has to find its fault


def test_a_right_kernel_passes_all_checks(toy, case):
    for check in (check_launches, check_tokens):
        assert check(toy, case, PythonBackend(), CPU) == []


def test_a_wrong_result_is_found(toy, case):
    (line,) = check_launches(toy, case, PythonBackend("wrong"), CPU)
    assert line.startswith("toy/small seed 0: y: 1 of 32 differ, worst at [0, 0]")


def test_results_that_the_case_does_not_name_are_found(toy, case):
    forgetful = replace(case, compare={"y": Exact()})
    (line,) = check_launches(toy, forgetful, PythonBackend(), CPU)
    assert "kernels give ['total', 'y'], the reference ['total', 'y'], compared ['y']" in line


def test_a_result_that_depends_on_the_number_of_tokens_is_found(toy, case):
    found = check_tokens(toy, case, PythonBackend("depends on n_tok"), CPU)
    assert [line.split(": ")[1] for line in found] == [f"tokens 0 to {n - 1} of 8" for n in (1, 2, 3)]


def test_a_result_that_depends_on_the_neighbour_is_found_where_tokens_are_alone(tmp_path):
    stateless = toy_operation.operation(tmp_path, stateless=True)
    case = stateless.cases()[0]
    assert check_tokens(stateless, case, PythonBackend(), CPU) == []
    (line,) = check_tokens(stateless, case, PythonBackend("depends on the neighbour"), CPU)
    assert "tokens 1 to 1 of 8: y: 4 of 4 differ" in line


def test_rows_behind_the_live_tokens_are_not_compared(tmp_path):
    stateless = toy_operation.operation(tmp_path, stateless=True)
    (case,) = stateless.cases()
    for count, n_found in ((1, 0), (2, 1)):  # the fault is in the second row
        counted = replace(case, make=lambda *where, n=count: case.make(*where) | {"count": torch.tensor([n])})
        found = check_tokens(stateless, counted, PythonBackend("depends on the neighbour"), CPU)
        assert len(found) == n_found, found


def test_a_second_run_that_differs_is_found(toy, case):
    *_, line = check_launches(toy, case, PythonBackend("not repeatable"), CPU)
    assert line.startswith("toy/small seed 0: second launch: y: 1 of 32 differ")


def test_tokens_are_taken_along_their_dimension(toy):
    other = replace(toy, token_inputs={"x": 1, "absent": 0})
    inputs = {"x": torch.arange(12.0).view(3, 4), "w": torch.zeros(5), "absent": None}
    part = take_tokens(other, inputs, 1, 3)
    assert part["x"].tolist() == [[1, 2], [5, 6], [9, 10]]
    assert part["x"].is_contiguous()
    assert part["w"] is inputs["w"]
    assert part["absent"] is None
    assert n_tokens(other, inputs) == 4
    with pytest.raises(ValueError, match=r"\[3, 5\] tokens"):
        n_tokens(replace(toy, token_inputs={"x": 0, "w": 0}), inputs)


# The table of resources


def test_a_changed_kernel_changes_its_row(toy, tmp_path):
    cubins = CubinCache(tmp_path / "cache")
    ((entry, constants, architecture), *rest) = resources.shipped([toy])
    assert len(rest) == len(ARCHITECTURES) - 1
    before = resources.row(entry, constants, architecture, cubins)
    assert resources.identity(before) == (entry.file, "toy", "kWidth=4", architecture)
    assert resources.row(entry, constants, architecture, cubins) == before
    shared = "__shared__ float s[99]; s[threadIdx.x] = x[threadIdx.x]; __syncthreads(); if (s[n_tok] > 0 && "
    entry.path.write_text(toy_operation.SOURCE.replace("if (", shared))
    after = resources.row(entry, constants, architecture, cubins)
    assert resources.identity(after) == resources.identity(before)
    assert (before["static_shared_bytes"], after["static_shared_bytes"]) == (0, 396)


def test_the_table_survives_the_file(toy, tmp_path):
    rows = list(resources.build_table([toy, replace(toy, name="twin")], CubinCache(tmp_path / "cache")))
    assert len(rows) == len(ARCHITECTURES)  # a variant that two operations share has one row
    (tmp_path / "table.json").write_text(resources.dump_table(rows))
    assert resources.load_table(tmp_path / "table.json") == (nvrtc_version(), resources.sources(rows), rows)
    (tmp_path / "table.json").write_text(resources.dump_table(rows)[:-20])
    with pytest.raises(Ds4Error, match=r"table\.json: no table of resources .*run scripts/kernel_resources\.py"):
        resources.load_table(tmp_path / "table.json")


def test_spills_count_in_the_decode_step_only(toy, tmp_path):
    rows = list(resources.build_table([toy], CubinCache(tmp_path / "cache")))
    assert resources.spills(rows, [toy]) == []
    spilled = [{**rows[0], "spill_store_bytes": 4}, *rows[1:], {**rows[0], "entry": "unknown", "spill_load_bytes": 4}]
    (line,) = resources.spills(spilled, [toy])
    assert "toy kWidth=4 sm_100a: 4 bytes stored, 0 loaded" in line
    assert resources.spills(spilled, [replace(toy, decode=False)]) == []


# The operations that are there


def families() -> set[str]:
    """The folders of ds4/kernels that register operations."""
    return {path.parent.name for path in KERNEL_ROOT.glob("*/op.py")}


def test_every_family_with_operations_is_listed():
    assert set(FAMILIES) == families()


def test_every_kernel_of_the_package_belongs_to_an_operation():
    in_files = {
        (path.relative_to(KERNEL_ROOT).as_posix(), name)
        for path in KERNEL_ROOT.rglob("*.cu")
        for name in kernel_signatures(read_source(path))
    }
    declared = {(entry.file, entry.name) for operation in OPERATIONS for entry in operation.entries}
    alone = (PROBE, bandwidth.COPY, bandwidth.READ)  # of no operation
    assert in_files == declared | {(entry.file, entry.name) for entry in alone}


def ids(value) -> str:
    return " ".join(macro_definitions(value)) if isinstance(value, tuple) else getattr(value, "name", str(value))


@pytest.mark.parametrize("operation", OPERATIONS, ids=ids)
def test_an_operation_is_complete(operation):
    for entry in operation.entries:
        check_entry(entry)
    assert {entry for entry, _ in operation.variants} == set(operation.entries), "each entry has shipped constants"
    for entry, constants in operation.variants:
        assert [name for name, _ in constants] == sorted(entry.constants)
    cases = operation.cases()
    assert len({case.name for case in cases}) == len(cases)
    assert {"smoke", "edges"} <= {case.group for case in cases}
    made, compared = set(), set()  # by all of them: an output may depend on the case
    for case in (case for case in cases if case.group in ("smoke", "edges")):
        inputs = case.make(0, CPU)
        given = operation.outputs(inputs)
        made |= set(given)
        compared |= set(case.compare)
        assert set(case.compare) == set(operation.reference(inputs))
        assert set(operation.mutates) | set(operation.token_inputs) <= set(inputs)
        assert {call.entry for call in operation.calls(inputs, given)} <= set(operation.entries)
    assert set(operation.workspaces) <= made
    assert set(operation.token_outputs) <= compared


@pytest.fixture(scope="session")
def cubins(request, tmp_path_factory):
    """Cubins that stay between test runs, in pytest's cache folder unless that is switched off; safe for workers."""
    cache = getattr(request.config, "cache", None)
    return CubinCache(Path(cache.mkdir("cubins")) if cache else tmp_path_factory.mktemp("cubins"))


@pytest.fixture(scope="session")
def committed():
    """The committed rows by identity; skipped where NVRTC is another one, which allocates registers otherwise."""
    version, _, rows = resources.load_table()
    if version != nvrtc_version():
        pytest.skip(f"the table is of NVRTC {version}, here is {nvrtc_version()}")
    return {resources.identity(row): row for row in rows}


def test_the_table_is_of_these_sources():
    _, digests, rows = resources.load_table()
    assert digests == resources.sources(rows), "run scripts/kernel_resources.py and look at what changed"
    assert resources.spills(rows, OPERATIONS) == []


def test_samples_reach_every_kernel_and_architecture():
    assert {(entry, architecture) for entry, _, architecture in SAMPLES} == {(e, a) for e, _, a in SHIPPED}
    assert set(SAMPLES) < set(SHIPPED)


@pytest.mark.parametrize(("entry", "constants", "architecture"), SAMPLES, ids=ids)
def test_a_kernel_compiles_without_warnings_and_as_the_table_says(entry, constants, architecture, cubins, committed):
    assert cubins.get(entry, constants, architecture).warnings == ()
    row = resources.row(entry, constants, architecture, cubins)
    assert committed.get(resources.identity(row)) == row, "run scripts/kernel_resources.py and look at what changed"
    assert resources.spills([row], OPERATIONS) == []


def test_the_table_has_no_other_rows(committed, capsys):
    shipped = {(entry.file, entry.name, architecture) for entry, _, architecture in SHIPPED}
    assert {(file, name, architecture) for file, name, _, architecture in committed} == shipped
    assert len(committed) == len(SHIPPED)
    with capsys.disabled():
        entries = {(entry.file, entry.name) for entry, _, _ in SHIPPED}
        print(f"\n{len(SHIPPED)} cubins in the table: {len(entries)} kernels, {len(ARCHITECTURES)} architectures")
