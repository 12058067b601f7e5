"""The GPU script on a CPU, at the smallest size and in fp32: it runs, agrees with the recording, and imports little."""

from __future__ import annotations

import subprocess
import sys

import pytest
from golden_numbers import ATOL, GOLDEN

from deploy.bench.gpu import main


def test_smallest_size_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    found = main(["--device", "cpu", "--sizes", "tiny", "--dtype", "float32", "--golden", str(GOLDEN)])
    parity = found["parity float32"]
    assert parity["logprobs_to_recorded"] < ATOL
    assert parity["velocity_to_cpu"] == parity["gradient_to_cpu_relative"] == 0
    tiny = found["tiny"]
    assert all(tiny[key] > 0 for key in ("images_per_s", "learner_step_s", "matrix_tflops"))
    assert 0 < tiny["denoiser_of_matrix_rate"] < 1 and 0 < tiny["learner_of_matrix_rate"] < 1
    assert "packed against plain" in tiny["packed_and_plain"]
    assert '"tiny"' in capsys.readouterr().out


def test_it_needs_neither_vllm_nor_deepspeed_nor_diffusers() -> None:
    absent = "import sys; sys.modules.update(dict.fromkeys(('vllm', 'deepspeed', 'diffusers', 'transformers', 'ray')))"
    subprocess.run([sys.executable, "-c", f"{absent}; import deploy.bench.gpu"], check=True, timeout=120)
