"""Packed models from strangers: what is refused, and that nothing is left of it."""

import errno
import io
import pickle
import shutil
import stat
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from teacher_files import Malicious

from espnet2_spear import __version__, load_model
from espnet2_spear.asr.encoder.zipformer_encoder import ZipformerEncoder
from espnet2_spear.asr.frontend.spear import SpearFrontend
from espnet2_spear.errors import CheckpointError
from espnet2_spear.hub import packed as models
from espnet2_spear.spear.student import SpearEncoder
from espnet2_spear.zipformer.config import ZipformerConfig


def weights(seed: int = 0) -> bytes:
    torch.manual_seed(seed)
    model = SpearEncoder(ZipformerConfig.from_name("tiny"))
    buffer = io.BytesIO()
    torch.save({f"student.{k}": v for k, v in model.state_dict().items()}, buffer)
    return buffer.getvalue()


def student_members(**more: bytes) -> dict[str, bytes]:
    """Members of a packed student, as ESPnet's pack() lays them out."""
    meta = {
        "yaml_files": {"train_config": "exp/x/config.yaml"},
        "files": {"model_file": "exp/x/m.pth"},
    }
    config = {"student": "tiny", "student_conf": {}, "init": "exp/x/m.pth"}
    stamp = {"spear_format": models.FORMAT, "espnet2_spear": __version__}
    return {
        "meta.yaml": yaml.safe_dump(meta).encode(),
        "exp/x/config.yaml": yaml.safe_dump(config).encode(),
        "exp/x/m.pth": weights(),
        "exp/x/spear_plugin.yaml": yaml.safe_dump(stamp).encode(),
        **more,
    }


def write(path: Path, members: dict[str, bytes]) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in members.items():
                file.writestr(name, content)
        return path
    with tarfile.open(path, "w:xz" if path.suffix == ".txz" else "w:gz") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def refused(path: Path, match: str) -> None:
    """It is refused by a message that names it, and nothing appears anywhere."""
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(CheckpointError, match=match) as error:
        models.unpack(path, path.parent / "out")
    assert str(path) in str(error.value)
    assert sorted(path.parent.rglob("*")) == before


@pytest.mark.parametrize("suffix", [".zip", ".tgz", ".tar.gz"])
def test_load_model_opens_a_packed_student(tmp_path: Path, suffix: str) -> None:
    packed = write(tmp_path / f"m{suffix}", student_members())
    model = load_model(packed, padding="exact")
    assert model.config.padding == "exact"
    expected = torch.load(io.BytesIO(weights()), weights_only=True)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[f"student.{name}"])
    # Unpacked by whatever tool, the folder opens as well, and a file named by it too.
    files = models.unpack_model(packed, tmp_path / "out")
    again = load_model(tmp_path / "out")
    torch.testing.assert_close(again.state_dict(), model.state_dict())
    assert files["model_file"] == str(tmp_path / "out/exp/x/m.pth")
    config = yaml.safe_load(Path(files["train_config"]).read_text())
    assert config["init"] == files["model_file"]


@pytest.mark.parametrize("suffix", [".zip", ".tgz"])
@pytest.mark.parametrize(
    "name", ["../evil", "/tmp/evil", "a/../../evil", "a\\..\\evil", "C:evil"]
)
def test_names_that_leave_the_folder(tmp_path: Path, suffix: str, name: str) -> None:
    members = student_members(**{name: b"x"})
    refused(write(tmp_path / f"m{suffix}", members), "outside its folder")


def test_links_and_devices(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("exp/link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as file:
        file.writestr(info, "/etc")
        file.writestr("exp/link/passwd", "x")
    refused(tmp_path / "m.zip", "'exp/link' is a link")
    kinds = [(tarfile.SYMTYPE, "link"), (tarfile.LNKTYPE, "link")]
    kinds += [(tarfile.CHRTYPE, "device"), (tarfile.FIFOTYPE, "device")]
    for kind, word in kinds:
        with tarfile.open(tmp_path / "m.tgz", "w:gz") as file:
            member = tarfile.TarInfo("exp/odd")
            member.type, member.linkname = kind, "/etc/passwd"
            file.addfile(member)
        refused(tmp_path / "m.tgz", f"'exp/odd' is a {word}")


def test_limits_and_what_is_there(tmp_path: Path, monkeypatch) -> None:
    for suffix in (".zip", ".tgz"):
        bomb = write(tmp_path / f"b{suffix}", {"a": bytes(80 << 20)})
        refused(bomb, "over 100 times its size")
        bomb.unlink()
    packed = write(tmp_path / "m.zip", {"a": b"1" * 1000, "b": b"2" * 1000})
    monkeypatch.setattr(models, "MAX_BYTES", 1500)
    refused(packed, "more than 1500 bytes")
    monkeypatch.setattr(models, "MAX_MEMBERS", 1)
    refused(packed, "more than 1 members")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a").write_text("mine")
    refused(packed, "is not empty")


def test_headers_that_lie(tmp_path: Path) -> None:
    """The zip says 10 bytes in both of its headers, and holds 100 000; a name twice."""
    path = write(tmp_path / "m.zip", {"a": b"1" * 100_000})
    content = path.read_bytes()
    real = (100_000).to_bytes(4, "little")
    assert content.count(real) == 2
    path.write_bytes(content.replace(real, (10).to_bytes(4, "little")))
    refused(path, "corrupt")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a", "1")
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("a", "2")
    refused(path, "'a' is in it twice")


@pytest.mark.parametrize("suffix", [".zip", ".tgz", ".txz"])
def test_corrupt_archives(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"m{suffix}", student_members())
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 255
    broken = [content[: len(content) // 2], bytes(flipped), b"no archive", b""]
    for damaged in broken:
        path.write_bytes(damaged)
        refused(path, "corrupt|is empty")
        with pytest.raises(CheckpointError, match=f"m{suffix}"):
            load_model(path)


def test_a_full_disk_is_no_corrupt_archive(tmp_path: Path, monkeypatch) -> None:
    path = write(tmp_path / "m.zip", student_members())

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="No space left"):
        models.unpack(path, tmp_path / "m")
    assert [*tmp_path.iterdir()] == [path]


def test_code_in_weights_is_not_executed(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"student.mask_emb": Malicious(tmp_path / "executed")}, buffer)
    for content in (buffer.getvalue(), pickle.dumps(Malicious(tmp_path / "executed"))):
        members = student_members(**{"exp/x/m.pth": content})
        packed = write(tmp_path / "m.zip", members)
        for open_it in (load_model, lambda p: models.unpack_model(p, tmp_path / "o")):
            with pytest.raises(CheckpointError, match="m.zip: .*m.pth: .*(code|read)"):
                open_it(packed)
        assert not (tmp_path / "executed").exists() and not (tmp_path / "o").exists()
    # Where it is trusted the exploit works.
    torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert (tmp_path / "executed").exists()


def test_newer_format(tmp_path: Path) -> None:
    stamp = yaml.safe_dump({"spear_format": 99, "espnet2_spear": "9.0"}).encode()
    packed = write(
        tmp_path / "m.zip", student_members(**{"exp/x/spear_plugin.yaml": stamp})
    )
    with pytest.raises(
        CheckpointError, match="9.0 in format 99.*pip install --upgrade espnet2-spear"
    ):
        load_model(packed)
    models.unpack(packed, tmp_path / "out")
    # The folder that was unpacked, the folder in it with the weights, the weights.
    (weights,) = (tmp_path / "out").rglob("*.pth")
    for path in (tmp_path / "out", weights.parent, weights):
        with pytest.raises(CheckpointError, match="pip install --upgrade"):
            load_model(path)


def test_newer_format_of_a_task() -> None:
    """ESPnet's inference classes build the frontend or encoder by its options."""
    newer = {"arch": "tiny", "spear_format": models.FORMAT + 1}
    for build in (SpearFrontend, partial(ZipformerEncoder, 1)):
        build(**{**newer, "spear_format": models.FORMAT})
        with pytest.raises(
            CheckpointError, match=r"(frontend|encoder) .*pip install --upgrade"
        ):
            build(**newer)


def test_other_models_and_bad_tables(tmp_path: Path) -> None:
    def meta(**tables: dict[str, str]) -> Path:
        content = yaml.safe_dump(tables).encode()
        return write(tmp_path / "m.zip", student_members(**{"meta.yaml": content}))

    config, file = "exp/x/config.yaml", "exp/x/m.pth"
    asr = meta(yaml_files={"asr_train_config": config}, files={"asr_model_file": file})
    assert load_model(asr).num_layers == 3  # whatever the arguments are called
    other = meta(yaml_files={"lm_train_config": config}, files={"lm_file": file})
    with pytest.raises(CheckpointError, match="no model that could be.*lm_train_conf"):
        load_model(other)
    for value in ("../m.pth", "/etc/passwd", "exp/x/gone.pth"):
        odd = meta(yaml_files={"train_config": config}, files={"model_file": value})
        with pytest.raises(CheckpointError, match="which is not in it"):
            load_model(odd)
    with pytest.raises(CheckpointError, match="no table 'files'"):
        load_model(meta(yaml_files={}))
    members = student_members()
    del members["meta.yaml"]
    with pytest.raises(CheckpointError, match="holds no meta.yaml.*no packed model"):
        load_model(write(tmp_path / "m.zip", members))


def test_configurations_that_grow(tmp_path: Path) -> None:
    """Aliases of YAML that hold themselves, or double sixty times."""
    endless = write(
        tmp_path / "a.zip", student_members(**{"exp/x/config.yaml": b"a: &a [*a]"})
    )
    with pytest.raises(CheckpointError, match="a.zip: .* never ends"):
        models.unpack_model(endless, tmp_path / "out")
    lines = ["x0: &x0 [1, 1]"]
    lines += [f"x{i}: &x{i} [*x{i - 1}, *x{i - 1}]" for i in range(1, 60)]
    bomb = "\n".join(lines).encode()
    packed = write(tmp_path / "b.zip", student_members(**{"exp/x/config.yaml": bomb}))
    models.unpack_model(packed, tmp_path / "out")
    for path in (endless, packed):
        with pytest.raises(CheckpointError, match="not the configuration of a SPEAR"):
            load_model(path)
