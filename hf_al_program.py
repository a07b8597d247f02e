"""The program `hf-al`. Not a module of the package, because it must defer the import of the models before the package
is imported: they take seconds, and no `--help` needs them."""

import os

os.environ["HF_AL_MODELS"] = "later"
from hf_al.cli import main as main

del os.environ["HF_AL_MODELS"]

if __name__ == "__main__":
    main()
