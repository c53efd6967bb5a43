"""A broken environment is named with what would fail, and a sound one is not called broken.

The environments are really broken: packages without their library, in another version, places that cannot be written.
"""

import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from peftscale import doctor
from peftscale.doctor import Check


def examine(settings: dict[str, str], looks: str = "None", *, first_on_path: Path | None = None) -> dict[str, Check]:
    """Doctor's checks by name, from a process of its own: what was imported here cannot hide what is broken there."""
    code = f"from peftscale import doctor; print(doctor.to_json(doctor.run({looks})))"
    env = {**os.environ, **settings}
    if first_on_path is not None:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(first_on_path), env.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()  # one object and nothing else, whatever the libraries print
    return {item["name"]: Check(**item) for item in json.loads(line)["checks"]}


def failed(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if check.status == "fail"}


def test_bitsandbytes_without_its_native_library_is_named(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("bitsandbytes")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    installed = Path(spec.submodule_search_locations[0])
    shutil.copytree(installed, tmp_path / "bitsandbytes", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    checks = examine({}, "[doctor._packages, doctor._bitsandbytes]", first_on_path=tmp_path)
    check = checks["bitsandbytes on cpu"]
    assert failed(checks) == {"bitsandbytes on cpu"}
    assert "native library missing" in check.found
    assert "base.quantization=nf4" in check.advice


def test_another_version_of_transformers_is_named(tmp_path: Path) -> None:
    for version, folder in (("4.40.0", "far"), ("5.22.9", "near")):
        metadata = tmp_path / folder / f"transformers-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: transformers\nVersion: {version}\n")
    far = examine({}, "[doctor._packages]", first_on_path=tmp_path / "far")
    near = examine({}, "[doctor._packages]", first_on_path=tmp_path / "near")
    assert failed(far) == {"transformers version"}
    assert far["transformers version"].found == "4.40.0"
    assert far["transformers version"].advice.startswith(
        "does not work with the others here; pip install 'transformers==5."
    )
    assert near["transformers version"].status == "warn"
    assert failed(near) == set()


def test_a_home_that_cannot_be_written_and_a_ray_that_does_not_answer_are_named(tmp_path: Path) -> None:
    no_home = tmp_path / "file"
    no_home.touch()  # nothing can be made under a file, not even by root
    settings = {
        "HOME": str(no_home),
        "PEFTSCALE_CACHE": str(no_home / "cache"),
        "RAY_ADDRESS": "127.0.0.1:1",
        "RAY_AUTH_MODE": "token",
        "DS_ACCELERATOR": "cuda",
        "OMP_NUM_THREADS": "0.5",
        "CUDA_VISIBLE_DEVICES": "",
    }
    checks = examine(settings)
    broken = {"cache", "ray token", "RAY_ADDRESS", "deepspeed accelerator", "OMP_NUM_THREADS"}
    assert failed(checks) - {"devices"} == broken
    assert f"{no_home}/cache/packs cannot be written" in checks["cache"].found
    assert "set PEFTSCALE_CACHE" in checks["cache"].advice
    assert checks["RAY_ADDRESS"].found.startswith("127.0.0.1:1 does not answer")
    assert "unset RAY_ADDRESS" in checks["RAY_ADDRESS"].advice
    assert "set HOME or RAY_AUTH_TOKEN_PATH" in checks["ray token"].advice


def test_a_token_file_that_others_can_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text("0" * 64)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    file.chmod(0o644)
    (check,) = doctor._ray_token()
    assert (check.status, check.advice) == ("warn", f"other users of this machine can read it; chmod 600 {file}")
    assert check.found == f"{file} has mode 0644"
    file.chmod(0o600)
    (check,) = doctor._ray_token()
    assert check.status == "ok"


def test_a_check_that_stumbles_is_a_finding_and_the_others_go_on(tmp_path: Path) -> None:
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed/__init__.py").write_text(
        "raise OSError('libcudart.so.13: cannot open shared object file')\n"
    )
    checks = examine({}, "[doctor._deepspeed, doctor._cpus]", first_on_path=tmp_path)
    assert failed(checks) == {"deepspeed"}
    assert "deepspeed cannot be imported: OSError: libcudart.so.13" in checks["deepspeed"].found
    assert "CPUs" in checks


def test_the_versions_that_work_together_are_those_of_the_constraints() -> None:
    text = (Path(__file__).parents[2] / "constraints.txt").read_text()
    pins = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)$", text, flags=re.MULTILINE))
    assert {name: pins[name] for name in doctor.WORKS_TOGETHER} == doctor.WORKS_TOGETHER


def test_the_table_shows_advice_as_it_is_written() -> None:
    check = Check(name="x", status="fail", found="[bold]1[/bold]", advice="pip install 'a[b]'")
    screen = io.StringIO()
    Console(width=100, file=screen).print(doctor.render([check]))
    assert "[bold]1[/bold]" in screen.getvalue()
    assert "-> pip install 'a[b]'" in screen.getvalue()
    assert json.loads(doctor.to_json([check]))["status"] == "fail"
