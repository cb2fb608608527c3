"""Have a tool itself read a file of an exported branch: python scripts/check_export.py TOOL FILE

TOOL is axolotl, llamafactory, skypilot or kubernetes. Only the tool's own reading and checking of settings runs: its
pydantic or dataclass schema, its JSON Schema, or the OpenAPI schema of Kubernetes. These tools pin versions that exclude
MERIT's and each other's, so this file imports nothing of MERIT and is run by the Python of an environment that has them
(docs/cluster.md).

Exit codes: 0 read, and its version is printed; 1 refused, with the tool's words; 77 not installed there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

ABSENT = 77
_KUBERNETES = "1.31"
"""The version in which pod failure policies became stable."""


def axolotl(config: dict[str, Any]) -> str:
    """As ``axolotl train`` reads it, without what it asks of the GPU; keys that it would ignore are refused, too."""
    schema = import_module("axolotl.utils.schemas.config").AxolotlInputConfig
    known = {name for key, field in schema.model_fields.items() for name in (key, field.alias)}
    _no_others(config, known)
    dataset = import_module("axolotl.utils.schemas.datasets").SFTDataset
    for rows in config["datasets"]:
        _no_others(rows, set(dataset.model_fields))
        dataset.model_validate(rows)
    read = schema.model_validate(dict(config))
    changed = {key for key in config if key != "datasets" and _plain(getattr(read, key)) != config[key]}
    if changed:
        raise ValueError(f"read as other values: {sorted(changed)}")
    return f"axolotl {version('axolotl')}"


def llamafactory(config: dict[str, Any]) -> str:
    """As ``llamafactory-cli train`` reads it, as one process of ``torchrun``."""
    os.environ.update(DISABLE_VERSION_CHECK="1", LOCAL_RANK="0", RANK="0", WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", LLAMAFACTORY_VERBOSITY="WARN")
    parser = import_module("llamafactory.hparams.parser")
    model, data, training, finetuning, _ = parser.get_train_args(dict(config))
    for key, value in config.items():
        read = [_plain(getattr(one, key)) for one in (model, data, training, finetuning) if hasattr(one, key)]
        if not any(found in (value, [value], str(value).split(",")) for found in read) and key not in _REWRITTEN:
            raise ValueError(f"{key}: {value!r} was read as {read}")
    return f"LLaMA-Factory {version('llamafactory')}"


_REWRITTEN = {"report_to", "disable_gradient_checkpointing"}


def skypilot(task: dict[str, Any]) -> str:
    """Against its JSON Schemas of tasks, resources and storage."""
    validate = import_module("jsonschema").validate
    schemas = import_module("sky.utils.schemas")
    validate(task, schemas.get_task_schema())
    validate(task["resources"], schemas.get_resources_schema())
    for mount in task["file_mounts"].values():
        validate(mount, schemas.get_storage_schema())
    return f"SkyPilot {version('skypilot')}"


def kubernetes(job: dict[str, Any]) -> str:
    """Against the OpenAPI schema of its API, strictly: other keys are refused."""
    checker = import_module("kubernetes_validate")
    checker.validate(job, _KUBERNETES, strict=True)
    return f"kubernetes-validate {version('kubernetes-validate')}, Kubernetes {_KUBERNETES}"


TOOLS: dict[str, Callable[[dict[str, Any]], str]] = {
    "axolotl": axolotl,
    "llamafactory": llamafactory,
    "skypilot": skypilot,
    "kubernetes": kubernetes,
}


def _no_others(config: dict[str, Any], known: set[str]) -> None:
    if others := sorted(config.keys() - known):
        raise ValueError(f"keys that are not in the schema: {others}")


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def main(tool: str, file: Path) -> int:
    """Do it; returns the exit code."""
    content = yaml.safe_load(file.read_text())
    try:
        print(TOOLS[tool](content))
    except ImportError as error:
        print(f"{tool} cannot be imported: {error}", file=sys.stderr)
        return ABSENT
    except Exception as error:
        print(f"{tool} refuses {file.name}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
