"""transformers' own model tests on the classes of hf_al: `make conformance`.

They are not part of the installed package, but of its source distribution, which is downloaded once. Their other
imports, for generation and exporters, are replaced by empty modules.
"""

import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
WORK = HERE.parents[1] / "out" / "conformance"
WANTED = ("test_modeling_common.py", "test_configuration_common.py")
COMMON = {  # values that any config takes
    "return_dict": False, "output_hidden_states": True, "dtype": "float16", "id2label": {0: "label"},
    "label2id": {"label": 0}, "problem_type": "regression", "architectures": ["ALModel"], "is_encoder_decoder": False,
}  # fmt: skip
EMPTY = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": f"config_common_kwargs = {COMMON!r}\n",
}


def download(folder: Path) -> None:
    """The wanted files of the installed version's source distribution into `folder`."""
    name = f"transformers=={version('transformers')}"
    options = ["--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(WORK)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, name], check=True)
    (archive,) = WORK.glob("transformers-*.tar.gz")
    with tarfile.open(archive) as files:
        for member in files:
            path = Path(member.name)
            if path.parent.name == "tests" and path.name in WANTED:
                with (folder / path.name).open("wb") as copy:
                    shutil.copyfileobj(files.extractfile(member), copy)
    archive.unlink()


def main() -> int:
    folder = WORK / f"transformers-{version('transformers')}" / "tests"
    for name, text in EMPTY.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    if not all((folder / name).is_file() for name in WANTED):
        download(folder)
    shutil.copy(HERE / "al_models.py", folder / "test_al_models.py")
    settings = folder.parent / "pytest.ini"
    settings.write_text("[pytest]\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-c", str(settings), "-q", "-W", "ignore", "-rf", str(folder)]
    return subprocess.run([*command, *sys.argv[1:]], cwd=folder.parent).returncode


if __name__ == "__main__":
    sys.exit(main())
