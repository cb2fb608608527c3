"""Carry out a merge plan: read blocks of all branches, combine, write in place, verify, rename. A few blocks in memory.

Shards are written one after another; within a shard, one thread per core takes spans of a tensor. Every input block is
hashed as it is read, every output block is read back and compared. The output is built in a hidden folder next to it in
which a shard gets its header only after it is verified and config.json is written last, so that a killed merge leaves
nothing that loads; the folder then moves to its final name. This guards against kills, not against power loss (no fsync).
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from merit.errors import CheckpointError, MergeError
from merit.files import building, write_text
from merit.hf.checkpoint import (
    TensorDigest,
    TensorInfo,
    combine_fingerprint,
    fingerprint,
    pread_into,
    read_digest,
)
from merit.hf.dtypes import BLOCK
from merit.hf.side_files import copy_files, copy_side_files, read_config, set_config_dtype
from merit.merge import agreement, card, native
from merit.merge.arithmetic import NonFiniteError
from merit.merge.plan import MergePlan, OutputFile, TensorPlan, check_output, check_space, index_json
from merit.merge.result import MergeResult, Source, WrittenFile
from merit.merge.searched import WeightSearch
from merit.merge.weights import ScaleSearch
from merit.merge.worker import SPAN, WHOLE, Reader, Statistics, TrimmedEntries, Worker
from merit.parallel import parallel, threads
from merit.progress import Progress, count, silent

__all__ = ["run_merge"]


def run_merge(
    plan: MergePlan, progress: Progress = silent, search: ScaleSearch | WeightSearch | None = None
) -> MergeResult:
    """Merge; the output folder appears under its name only when complete and verified.

    Args:
        plan: From ``plan_merge`` or ``lora.plan_adapter_merge``.
        progress: In bytes; called from any thread, never from two at once.
        search: How the plan's weights or its λ were found, for the record.

    Raises:
        MergeError: A tensor is not finite (named, with its branch), integer tensors differ, or the result overflows.
        CheckpointError: An input changed since it was recorded or planned, or the disk returned different bytes.
        ResourceError: The disk filled up.
    """
    started = time.perf_counter()
    check_output(plan.output, [])
    check_space(plan.output, plan.output_bytes)
    with building(plan.output) as temporary:
        run = _Run(plan, temporary, progress)
        run.write()
        result = run.result(round(time.perf_counter() - started, 3), search)
        result.save(temporary)
        check_output(plan.output, [])
    return result


class _Run:
    """The state of one merge: open files, digests, progress, statistics."""

    def __init__(self, plan: MergePlan, temporary: Path, progress: Progress) -> None:
        self.plan, self.temporary, self.progress = plan, temporary, progress
        self.reader, self.statistics = Reader(plan), Statistics()
        self.written = TensorDigest()
        self.lock = threading.Lock()
        self.files: dict[str, WrittenFile] = {}
        self.inputs: list[str] = []
        self.done = 0
        self.total = (
            plan.output_bytes
            + sum(h.nbytes for h in (*plan.heads, *plan.moments))
            + self.reader.with_base * plan.base.nbytes
        )

    # ---- the order of events

    def write(self) -> None:
        plan = self.plan
        for k, one, other in plan.twins:
            self._check_twins(k, one, other)
        for tensor in (t for f in plan.files for t in f.tensors):
            self.written.add_tensor(tensor.out)
        kinds = {t.kind for f in plan.files for t in f.tensors}
        try:
            entries = TrimmedEntries(self.reader, plan, self.statistics) if "block" in kinds else None
        except NonFiniteError as error:
            raise self._not_finite(str(error.tensor), "", error.source) from None
        if "linear" in kinds:
            native.load()  # compiled here on first use, not by every thread
        # The workers already fill the cores, and results must not depend on the number of BLAS threads.
        with nullcontext() if kinds <= {"linear", "exact"} else threadpool_limits(1):
            self.files = {file.name: self._write_file(file, entries) for file in plan.files}
        self.inputs = self._input_fingerprints()
        self._write_side_files(self.inputs)

    def _check_twins(self, k: int, one: TensorInfo, other: TensorInfo) -> None:
        folder = self.reader.folders[k + 1]
        with (folder / one.file).open("rb") as a, (folder / other.file).open("rb") as b:
            left, right = bytearray(BLOCK), bytearray(BLOCK)
            for start in range(0, one.nbytes if one.nbytes == other.nbytes else 0, BLOCK):
                n = min(BLOCK, one.nbytes - start)
                pread_into(a.fileno(), memoryview(left)[:n], one.start + start, folder / one.file)
                pread_into(b.fileno(), memoryview(right)[:n], other.start + start, folder / other.file)
                if left[:n] != right[:n]:
                    break
            else:
                if one.nbytes == other.nbytes:
                    return
        raise MergeError(
            f"{one.name} and {other.name} differ in {self.plan.branches[k].name}, but the base ties them.",
            "The branch was trained with untied embeddings; it does not belong to this base.",
        )

    def _advance(self, nbytes: int) -> None:
        with self.lock:
            self.done += nbytes
            self.progress(min(self.done, self.total), self.total)

    # ---- writing

    def _write_file(self, file: OutputFile, entries: TrimmedEntries | None) -> WrittenFile:
        path = self.temporary / file.name
        output = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        spans = [
            (tensor, first)
            for tensor in file.tensors
            for first in ((0,) if tensor.kind in WHOLE else range(0, max(1, tensor.out.blocks), SPAN))
        ]
        try:
            reserve = getattr(os, "posix_fallocate", lambda fd, start, size: os.ftruncate(fd, start + size))  # macOS
            reserve(output, 0, file.size)
            with self.reader.open(file.tensors):
                parallel(lambda take: self._work(take, spans, output, entries), min(threads(), len(spans)))
            digest = self._verify(file, output, path)
            os.pwrite(output, file.header, 0)
            if os.pread(output, len(file.header), 0) != file.header:
                raise CheckpointError(f"{path}: the disk returned a different header from the one written.")
        finally:
            os.close(output)
        return WrittenFile(file.size, digest)

    def _work(
        self,
        take: Callable[[], int],
        spans: Sequence[tuple[TensorPlan, int]],
        output: int,
        entries: TrimmedEntries | None,
    ) -> None:
        worker = Worker(self.reader, self.plan, self.statistics, entries)
        ahead, window = 0, 2 * threads() + 2
        while (i := take()) < len(spans):
            tensor, first = spans[i]
            for later in spans[max(i, ahead) : i + window]:
                self.reader.prefetch(*later)
            ahead = i + window
            try:
                result = worker.merge(tensor, first)
            except NonFiniteError as error:
                raise self._not_finite(tensor.out.name, tensor.out.dtype.tag, error.source) from None
            out = tensor.out
            data = memoryview(result.view(np.uint8))  # type: ignore[arg-type]
            self.written.add(out.name, first, data)
            _pwrite(output, data, out.start + first * BLOCK * out.dtype.itemsize)
            self._advance(
                len(data) + sum(s.dtype.itemsize * result.size for s in tensor.sources[not self.reader.with_base :])
            )

    def _not_finite(self, name: str, dtype: str, source: int | None) -> MergeError:
        if source is not None and source > len(self.plan.branches):
            branch = self.plan.branches[source - len(self.plan.branches) - 1].name
            return MergeError(
                f"{name}: the second moments of {branch} contain NaN or infinity.", "Retrain that branch."
            )
        if source is None:
            return MergeError(
                f"{name}: the merged values overflow {dtype}.",
                "Choose a smaller merge.scale (--scale), or merge.dtype: float32. Nothing was left behind.",
            )
        where = "the base" if source == 0 else self.plan.branches[source - 1].name
        return MergeError(
            f"{name} contains NaN or infinity in {where} ({self.reader.folders[source]}).",
            "Retrain that branch (a lower learning rate?), or leave it out. Nothing was left behind.",
        )

    def _verify(self, file: OutputFile, output: int, path: Path) -> str:
        """Read every block back; returns the file's weights digest."""
        digest = read_digest([t.out for t in file.tensors], {file.name: output}, path.parent)
        bad = [name for name in digest.same(self.written) if name in {t.out.name for t in file.tensors}]
        if bad:
            raise CheckpointError(
                f"{file.name}: {bad[0]} reads back differently from what was written ({count(len(bad), 'tensor')}).",
                "The disk or the memory of this machine is faulty. Nothing was left behind.",
            )
        return digest.hexdigest()

    # ---- everything around the tensors

    def _input_fingerprints(self) -> list[str]:
        """Fingerprints of base and branches, from the streamed data; compared with the recorded ones."""
        plan, reader = self.plan, self.reader
        sources = [(plan.base.folder, plan.base_fingerprint, "the base")]
        sources += [(b.path, b.fingerprint, b.name) for b in plan.branches]
        result = []
        for k, (folder, recorded, name) in enumerate(sources):
            if k == 0 and recorded is not None and not reader.with_base:
                result.append(recorded)
                continue
            head = (plan.base, *plan.heads)[k] if k <= len(plan.heads) else None
            if head is not None and reader.digests[k].covers(head.tensors):
                found = combine_fingerprint(folder, reader.digests[k].hexdigest())
            else:  # an adapter, or a branch with a tied copy that did not stream
                found = fingerprint(folder)
            if recorded is not None and recorded != found:
                raise CheckpointError(
                    f"{name} ({folder}) is not what was recorded: fingerprint {recorded}, found {found}.",
                    "Its files have changed or been damaged since. Copy it again or retrain it. Nothing was left behind.",
                )
            result.append(found)
        return result

    def _write_side_files(self, inputs: Sequence[str]) -> None:
        plan, folder = self.plan, self.temporary
        index = index_json(plan)
        if index is not None:
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            write_text(folder / "model.safetensors.index.json", text, durable=False)
        if plan.template is not None:
            write_text(folder / "chat_template.jinja", plan.template, durable=False)
        write_text(folder / "README.md", card.model_card(plan, inputs), durable=False)
        copy_side_files(plan.base.folder, folder)
        copy_files(agreement.common_processor(plan.base.folder, [branch.path for branch in plan.branches]), folder)
        if plan.dtype is not None and (folder / "config.json").is_file():
            config = set_config_dtype(read_config(folder), plan.dtype)
            write_text(folder / "config.json", json.dumps(config, indent=2) + "\n", durable=False)

    def result(self, seconds: float, search: ScaleSearch | WeightSearch | None) -> MergeResult:
        plan, base = self.plan, self.plan.base.folder
        return MergeResult(
            folder=plan.output,
            operator=plan.operator.name,
            options=plan.options,
            scale=float(plan.scale),
            weights=tuple(plan.shares),
            counts=tuple(int(c) if c.denominator == 1 else float(c) for c in plan.counts),
            counted=plan.branches[0].counted or "given",
            base=Source(base.name, str(base), self.inputs[0]),
            branches=tuple(Source(b.name, str(b.path), f) for b, f in zip(plan.branches, self.inputs[1:], strict=True)),
            model_fingerprint=combine_fingerprint(self.temporary, self.written.hexdigest()),
            files=self.files,
            arithmetic=" and ".join(sorted(self.statistics.paths)) or "numpy",
            statistics=self.statistics.summary(),
            excluded=plan.excluded,
            warnings=plan.warnings,
            merge_seconds=seconds,
            adapters=plan.adapters,
            scale_search=search if isinstance(search, ScaleSearch) else None,
            weight_search=search if isinstance(search, WeightSearch) else None,
            weights_by_pattern=plan.shares_by_pattern,
        )


def _pwrite(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        put = os.pwrite(descriptor, data, offset)
        data, offset = data[put:], offset + put
