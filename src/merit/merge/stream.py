"""Carry a merge plan out: read blocks of all branches, combine, write in place, verify, rename. A few blocks in memory.

Shards are written one after another; within a shard, one thread per core takes spans of a tensor. Every input block is
hashed as it passes, every output block is read back and compared. The output is built in a hidden sibling folder, in which
a shard gets its header only after it is verified and config.json is written last, so that a killed merge leaves nothing
that loads; the folder then moves to its final name. This guards against kills, not against power loss (no fsync).
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from merit.errors import CheckpointError, MergeError, ResourceError
from merit.hf.checkpoint import (
    TensorDigest,
    TensorInfo,
    combine_fingerprint,
    copy_side_files,
    fingerprint,
    pread_into,
    read_config,
    read_digest,
)
from merit.hf.dtypes import BLOCK
from merit.merge import card, native
from merit.merge.arithmetic import NonFiniteError
from merit.merge.plan import (
    Extra,
    MergePlan,
    OutputFile,
    TensorPlan,
    check_output,
    check_space,
    index_json,
    write_extra,
)
from merit.merge.worker import SPAN, Reader, Statistics, TrimmedEntries, Worker
from merit.parallel import parallel, threads

__all__ = ["MergeResult", "run_merge"]

Progress = Callable[[int, int], None]
"""progress(bytes done, bytes in all), called from any thread, never from two at once."""


@dataclass(frozen=True)
class MergeResult:
    """What came out.

    Attributes:
        output: The new checkpoint folder.
        record: Plain JSON values for ``merged/record.json``: operator, options, scale, weights, tokens, branches with
            fingerprints, output files with digests, statistics, excluded, warnings, seconds.
    """

    output: Path
    record: dict[str, Any]


def run_merge(plan: MergePlan, progress: Progress | None = None, extra: Extra | None = None) -> MergeResult:
    """Merge; the output folder appears under its name only when complete and verified.

    Args:
        plan: From ``plan_merge`` or ``lora.plan_adapter_merge``.
        progress: Told how far it is.
        extra: Given the complete record, returns small text files by name to lie beside the weights: they are written
            before the folder gets its name, so that it never appears without them.

    Raises:
        MergeError: A tensor is not finite (named, with its branch), integer tensors differ, the result overflows.
        CheckpointError: An input changed since it was recorded or planned, or the disk returned other bytes than written.
        ResourceError: The disk filled up.
    """
    started = time.perf_counter()
    check_output(plan.output, [])
    check_space(plan.output, plan.output_bytes)
    plan.output.absolute().parent.mkdir(parents=True, exist_ok=True)
    _sweep(plan.output)
    temporary = plan.output.absolute().parent / f".{plan.output.name}.partial-{os.getpid()}"
    temporary.mkdir()
    try:
        record = _Run(plan, temporary, progress).run()
        record["seconds"] = round(time.perf_counter() - started, 3)
        write_extra(temporary, extra, record)
        check_output(plan.output, [])
        temporary.rename(plan.output.absolute())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise ResourceError(
            f"The disk of {plan.output.absolute().parent} filled up; merging needs {plan.output_bytes / 1e9:.2f} GB.",
            "Free some space, or choose an --output on another disk. Nothing was left behind.",
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return MergeResult(plan.output, record)


def _sweep(output: Path) -> None:
    """Remove what killed merges into the same output left behind."""
    for path in output.absolute().parent.glob(f".{output.name}.partial-*"):
        pid = re.fullmatch(r"\d+", path.name.rsplit("-", 1)[-1])
        if pid and not Path(f"/proc/{pid[0]}").exists() and not _alive(int(pid[0])):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class _Run:
    """The state of one merge: open files, digests, progress, statistics."""

    def __init__(self, plan: MergePlan, temporary: Path, progress: Progress | None) -> None:
        self.plan, self.temporary, self.progress = plan, temporary, progress
        self.reader, self.statistics = Reader(plan), Statistics()
        self.written = TensorDigest()
        self.lock = threading.Lock()
        self.done = 0
        self.total = plan.output_bytes + sum(h.nbytes for h in plan.heads) + self.reader.with_base * plan.base.nbytes

    # ---- the order of events

    def run(self) -> dict[str, Any]:
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
            native.load()  # compiled here at the first time, not by every thread
        with nullcontext() if kinds <= {"linear", "exact"} else _one_blas_thread():
            files = {file.name: self._write_file(file, entries) for file in plan.files}
        inputs = self._input_fingerprints()
        self._write_side_files(inputs)
        outputs = {
            "files": files,
            "fingerprint": combine_fingerprint(self.temporary, self.written.hexdigest()),
        }
        return self._record(inputs, outputs)

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
        if self.progress:
            with self.lock:
                self.done += nbytes
                self.progress(min(self.done, self.total), self.total)

    # ---- writing

    def _write_file(self, file: OutputFile, entries: TrimmedEntries | None) -> dict[str, Any]:
        path = self.temporary / file.name
        output = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        spans = [
            (tensor, first)
            for tensor in file.tensors
            for first in ((0,) if tensor.kind in ("matrix", "compute") else range(0, max(1, tensor.out.blocks), SPAN))
        ]
        try:
            reserve = getattr(os, "posix_fallocate", lambda fd, start, size: os.ftruncate(fd, start + size))  # macOS
            reserve(output, 0, file.size)
            with self.reader.open(file.tensors):
                parallel(lambda take: self._work(take, spans, output, entries), min(threads(), len(spans)))
            digest = self._verify(file, output, path)
            os.pwrite(output, file.header, 0)
            if os.pread(output, len(file.header), 0) != file.header:
                raise CheckpointError(f"{path}: the disk returned another header than was written.")
        finally:
            os.close(output)
        return {"bytes": file.size, "digest": digest}

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
        if source is None:
            return MergeError(
                f"{name}: the merged values overflow {dtype}.",
                "Choose a smaller --scale, or dtype: float32. Nothing was left behind.",
            )
        where = "the base" if source == 0 else self.plan.branches[source - 1].name
        return MergeError(
            f"{name} holds NaN or infinity in {where} ({self.reader.folders[source]}).",
            "Retrain that branch (a lower learning rate?), or leave it out. Nothing was left behind.",
        )

    def _verify(self, file: OutputFile, output: int, path: Path) -> str:
        """Read every block back; returns the file's weights digest."""
        digest = read_digest([t.out for t in file.tensors], {file.name: output}, path.parent)
        bad = [name for name in digest.same(self.written) if name in {t.out.name for t in file.tensors}]
        if bad:
            raise CheckpointError(
                f"{file.name}: {bad[0]} reads back other bytes than were written ({len(bad)} tensor(s)).",
                "The disk or the memory of this machine is faulty. Nothing was left behind.",
            )
        return digest.hexdigest()

    # ---- everything around the tensors

    def _input_fingerprints(self) -> list[str]:
        """Fingerprints of base and branches, from what streamed by; compared with the recorded ones."""
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
                    "Its files changed or were damaged since. Copy it again or retrain it. Nothing was left behind.",
                )
            result.append(found)
        return result

    def _write_side_files(self, inputs: Sequence[str]) -> None:
        plan, folder = self.plan, self.temporary
        index = index_json(plan)
        if index is not None:
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        if plan.template is not None:
            (folder / "chat_template.jinja").write_text(plan.template, encoding="utf-8")
        (folder / "README.md").write_text(card.model_card(plan, inputs), encoding="utf-8")
        copy_side_files(plan.base.folder, folder)
        if plan.dtype is not None and (folder / "config.json").is_file():
            config = read_config(folder)
            config["dtype" if "dtype" in config else "torch_dtype"] = plan.dtype
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _record(self, inputs: Sequence[str], outputs: Mapping[str, Any]) -> dict[str, Any]:
        plan = self.plan
        return {
            "operator": plan.operator.name,
            "options": plan.options,
            "scale": float(plan.scale),
            "weights": plan.shares,
            "tokens": [int(c) if c.denominator == 1 else float(c) for c in plan.counts],
            "base": {"path": str(plan.base.folder), "fingerprint": inputs[0]},
            "branches": [
                {"name": b.name, "path": str(b.path), "fingerprint": f}
                for b, f in zip(plan.branches, inputs[1:], strict=True)
            ],
            "output": outputs,
            "statistics": self.statistics.summary(),
            "excluded": list(plan.excluded),
            "warnings": list(plan.warnings),
            **plan.notes,
        }


def _one_blas_thread() -> AbstractContextManager[Any]:
    """One BLAS thread per worker: the workers already fill the cores, and results do not depend on the thread count."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1)


def _pwrite(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        put = os.pwrite(descriptor, data, offset)
        data, offset = data[put:], offset + put
