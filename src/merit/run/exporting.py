"""`merit branch export`: one branch in a folder of its own, to be trained anywhere, and by whom one likes.

The folder holds all that decides the branch: the resolved recipe, the encoded rows of its group, and the hash of the base.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from merit.errors import MixtureError, RecipeError, RunFolderError
from merit.files import appending, building, require_space, write_json, write_text
from merit.hf.images import ImageRef
from merit.hf.side_files import copy_files
from merit.launch.elsewhere import Handover, kubernetes_job, readme, script, sky_task
from merit.mixture import DatasetCounts, EncodedDataset, load_split, read_counts
from merit.recipe.load import dump_recipe, load_recipe
from merit.run import key
from merit.run.branches import BranchId, group_of, scope_of, stage_of
from merit.run.manifest import Manifest
from merit.run.record import plain, shown
from merit.run.session import Session
from merit.run.store import split_of


@dataclass(frozen=True)
class Export:
    """A branch that was exported.

    Attributes:
        folder: Where it is.
        manifest: What it is of.
        bytes: Its size.
        with_base: Whether the base is in it.
    """

    folder: Path
    manifest: Manifest
    bytes: int
    with_base: bool


def export_branch(
    session: Session, branch: BranchId, folder: Path, *, with_base: bool = False, refer_to_data: bool = False
) -> Export:
    """Write a branch into a new folder; its README says how it is trained there.

    Args:
        session: The command's session; the run is split already.
        branch: Which.
        folder: To be made.
        with_base: Copy the base, too; otherwise it is named with its hash.
        refer_to_data: Name the encoded rows with their hashes instead of copying them.

    Raises:
        RunFolderError: ``folder`` is not empty, or the run has no split yet.
        RecipeError: There is no such branch.
        ResourceError: It does not fit on the disk.
    """
    refuse_full(folder)
    if (rounds := session.recipe_of(scope_of(session, branch)).rounds) > 1:
        raise RecipeError(
            f"branch {branch}: train.rounds is {rounds}, and a branch that is exported trains in one go.",
            f"With several rounds, copy the run folder and run `merit train {session.run} --branch {branch.k}` there, round "
            "after round (docs/rounds.md).",
        )
    manifest = manifest_of(session, branch)
    rows = load_split(session.run / "mixture", "train").only(manifest.group)
    if refer_to_data:
        manifest = replace(manifest, data=str((session.run / "mixture").resolve()))
    weights = sum(path.stat().st_size for path in session.base.folder.glob("*")) if with_base else 0
    require_space(folder, weights + (0 if refer_to_data else _size(rows)), f"branch {branch}")
    recipe = session.recipe_of(scope_of(session, branch)).model_copy(update={"prepare": None})
    handover = Handover(
        title=f"{recipe.name}-branch-{branch}",
        branch=str(branch),
        base=recipe.model.base,
        base_hash=manifest.base,
        with_base=with_base,
        base_is_local=Path(recipe.model.base).is_dir(),
        processes=recipe.train.processes,
    )
    with building(folder) as place:
        manifest.save(place)
        write_text(place / "recipe.yaml", dump_recipe(recipe))
        split_of(scope_of(session, branch).root).save(place / "split")
        if not refer_to_data:
            _copy_rows(session, rows, place / "mixture")
        if with_base:
            files = {path.name: path for path in session.base.folder.iterdir() if path.is_file()}
            copy_files(files, place / "base")
        write_text(place / "README.md", readme(handover, manifest.group, manifest.samples))
        write_text(place / "train.sh", script())
        (place / "train.sh").chmod(0o755)
        write_text(place / "sky.yaml", sky_task(handover))
        write_text(place / "kubernetes.yaml", kubernetes_job(handover))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Export(folder, manifest, size, with_base)


def manifest_of(session: Session, branch: BranchId) -> Manifest:
    """What a branch is of, as requested now.

    Raises:
        RecipeError: It is trained in rounds, between which it needs the other branches.
    """
    rounds = session.recipe_of(scope_of(session, branch)).rounds
    if rounds > 1:
        raise RecipeError(
            f"train.rounds: {rounds}: a branch that is averaged with the others between rounds cannot be trained alone.",
            "Use launch.where: local, ray or slurm, or train.rounds: 1.",
        )
    stage, group = stage_of(session, branch), sorted(group_of(session, branch))
    counts = counts_of(session, group)
    model, train = session.recipe.model, session.recipe.train
    return Manifest(
        branch=str(branch),
        run=session.recipe.name,
        group=tuple(group),
        base=session.base.fingerprint,
        base_path=model.base,
        base_revision=model.revision,
        rows={item.name: item.fingerprint for item in counts},
        samples=sum(item.rows for item in counts),
        tokens=sum(item.tokens for item in counts),
        target_tokens=sum(item.target_tokens for item in counts),
        epochs=train.epochs,
        settings=plain(stage.settings),
        answer=stage.fingerprint,
    )


def refuse_other_settings(session: Session) -> None:
    """Refuse a recipe (--set) that would make another branch of it than the one that the run folder asks for.

    Raises:
        RecipeError: Naming each setting.
    """
    file = session.run / "recipe.yaml"
    if file.is_file() and (other := key.deciding_changes(load_recipe(file), session.given, session.run)):
        raise RecipeError(
            f"{session.run}: --set changes what its branches are (run -> --set):",
            *shown(other),
            f"Change the run first: `merit run {session.run} --until split --set ...`. Nothing was written.",
        )


def counts_of(session: Session, group: list[str]) -> list[DatasetCounts]:
    """What was counted of a group's datasets."""
    return [item for item in read_counts(session.run / "mixture") if item.name in group]


def refuse_full(folder: Path) -> None:
    """Refuse to write into a folder that holds something.

    Raises:
        RunFolderError: It does.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunFolderError(f"{folder} exists and is not empty.", "Choose another --to FOLDER. Nothing was written.")
    if folder.is_dir():
        folder.rmdir()


def _size(rows: Mapping[str, EncodedDataset]) -> int:
    pictures = {image.digest: image.nbytes for item in rows.values() for images in item.images for image in images}
    return sum(8 * int(item.lengths.sum()) for item in rows.values()) + sum(pictures.values())


def _copy_rows(session: Session, rows: Mapping[str, EncodedDataset], folder: Path) -> None:
    """The rows as the mixture stage keeps them, with the images that they name in files next to them."""
    write_json(folder / "datasets.json", [asdict(item) for item in counts_of(session, list(rows))])
    for name, item in rows.items():
        if any(item.images):
            _pack_images(item, folder)
        else:
            (folder / "train").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(session.run / "mixture" / "train" / f"{name}.parquet", folder / "train" / f"{name}.parquet")


def _pack_images(item: EncodedDataset, folder: Path) -> None:
    file, placed = f"images/train/{item.name}.bin", dict[str, int]()
    with appending(folder / file) as pack:

        def place(image: ImageRef) -> ImageRef:
            if image.digest not in placed:
                placed[image.digest] = pack.tell()
                with Path(image.file).open("rb") as source:
                    source.seek(image.offset)
                    data = source.read(image.nbytes)
                if len(data) != image.nbytes:
                    raise MixtureError(f"{image.file} became shorter since its rows were encoded.")
                pack.write(data)
            return replace(image, file=file, offset=placed[image.digest])

        moved = [replace(row, images=tuple(map(place, row.images))) for row in item]
    packed = EncodedDataset(item.name, moved, json.loads(item.seeing))
    if packed.fingerprint != item.fingerprint:
        raise MixtureError(f"{item.name}: its rows changed while they were packed.", "Export the branch again.")
    packed.save(folder / "train" / f"{item.name}.parquet")
