"""`unigrpo export`: a run's checkpoint as a directory that other programs load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from common.config import ConfigError
from common.rundir import RunDirectory, make_directory, replacing_directory


def export(run: RunDirectory, out: Path, step: int | None = None, dtype: str | None = None) -> Path:
    """Writes the policy of a run's newest whole checkpoint, or of `step`, to the new directory `out`.

    For BAGEL `out` is the released layout with two directories besides: `reasoner/`, the understanding half for vLLM,
    and `vae/`, the autoencoder for diffusers. A composed policy's halves are in their libraries' layouts already.
    dtype (of safetensors' names, e.g. bfloat16) rounds the policy; without it the fp32 masters are written.

    Everything is written aside, then renamed. ConfigError if `out` exists or the run has no such checkpoint;
    CheckpointError if that is damaged.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; give a directory that does not")
    source = _checkpoint(run, step) / "policy"
    make_directory(out.absolute().parent, "out")
    with replacing_directory(out, new=True) as aside:
        # A composed policy has one config in each of its halves.
        if (source / "config.json").is_file():
            _write_bagel(source, aside, dtype)
        elif dtype:
            raise ConfigError(
                f"--dtype is {dtype}; a composed policy is exported in the types of its files, leave it out"
            )
        else:
            shutil.copytree(source, aside, dirs_exist_ok=True)
        origin = {
            "run": run.path.name,
            "step": int(source.parent.name.rpartition("-")[2]),
            "dtype": dtype or "as trained",
        }
        (aside / "export.json").write_text(json.dumps(origin, indent=2))
    return out


def _checkpoint(run: RunDirectory, step: int | None) -> Path:
    from learner.checkpoint import MANIFEST, newest_whole, verify

    if step is None:
        found = newest_whole(run.checkpoints)
        if found is None:
            raise ConfigError(f"{run.path} has no whole checkpoint yet; see checkpoints.every")
        return found[0]
    directory = run.checkpoint(step)
    if not (directory / MANIFEST).is_file():
        there = sorted(int(path.parent.name.rpartition("-")[2]) for path in run.checkpoints.glob(f"step-*/{MANIFEST}"))
        raise ConfigError(f"--step is {step}, but {run.path} has checkpoints of steps {there}; give one of them")
    verify(directory)
    return directory


def _write_bagel(source: Path, out: Path, dtype: str | None) -> None:
    import torch
    from safetensors.torch import load_file

    from common.bagel import checkpoint as store
    from common.bagel.vae import load_vae
    from common.checkpoint_files import TensorFiles, write_tensors
    from rollout.reasoner_dir import understanding_weights, write_reasoner_dir

    config = store.check(source)
    type_ = getattr(torch, dtype) if dtype else None
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("ema*"), dirs_exist_ok=True)
    files = TensorFiles.find(source, store.WEIGHTS)
    write_tensors(dict(files.read(files.files)), out / store.WEIGHTS, dtype=type_)

    stated = out / "llm_config.json"
    llm = store.describe_decoder(config, stated.read_bytes() if stated.exists() else b"{}")
    own = (name for name in files.files if not (config.llm_config.tie_word_embeddings and name == store.HEAD))
    rounded = ((name, tensor.to(type_ or tensor.dtype)) for name, tensor in files.read(own))
    write_reasoner_dir(
        out / "reasoner", llm | ({"torch_dtype": dtype} if dtype else {}), understanding_weights(rounded)
    )
    for file in out.iterdir():
        if file.name.startswith(
            ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "generation_config")
        ):
            shutil.copy(file, out / "reasoner")

    load_vae(config.vae_config, load_file(source / store.AUTOENCODER)).save_pretrained(out / "vae")
