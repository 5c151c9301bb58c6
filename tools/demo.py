"""The demo: train on the sample, use the model, and say where everything is.

Run by `make demo`. Writes into one folder and needs no network.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

from kenspeckle.standard import write_sample_pictures


def ken(*words: str) -> None:
    """Show and run one command as a user would type it."""
    print(f"\n$ ken {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "kenspeckle", *words], check=True)


def main(folder: Path) -> None:
    """Run the demo in `folder`, which is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started = time.perf_counter()
    model = str(folder / "sample.ken")
    pictures = write_sample_pictures(folder / "pictures", 6)
    ken("train", "sample", "--time", "60s", "--out", model, "--run-folder", str(folder / "run"))
    ken("predict", model, *map(str, pictures))
    ken("info", model, "--verify")
    print(
        f"\nThe demo took {time.perf_counter() - started:.0f} s. Look at {folder}/run/report.html"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
