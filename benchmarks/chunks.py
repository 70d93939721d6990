"""How representations are written and read fastest: sizes of chunks, checksums, compression, shards."""

import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import zarr
from features import ROOT, machine
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

IMAGES, SHAPE, BATCH = 512, (256, 256), 64
WAYS = {
    "4 images, checksum": (4, [Crc32cCodec()], None),
    "16 images, checksum": (16, [Crc32cCodec()], None),
    "64 images, checksum": (64, [Crc32cCodec()], None),
    "16 images, nothing": (16, None, None),
    "16 images, zstd, checksum": (16, [ZstdCodec(level=1), Crc32cCodec()], None),
    "16 images, lz4 shuffled, checksum": (16, [BloscCodec(cname="lz4", shuffle="shuffle"), Crc32cCodec()], None),
    "shards of 64, 4 images, checksum": (4, [Crc32cCodec()], (BATCH, *SHAPE)),
    "shards of 64, 16 images, checksum": (16, [Crc32cCodec()], (BATCH, *SHAPE)),
}


def main() -> None:
    values = np.maximum(np.random.default_rng(0).standard_normal((IMAGES, *SHAPE), dtype=np.float32), 0)
    size, lines = values.nbytes / 1e9, [f"{machine()}; {IMAGES} images of 256 x 256 float32, after a ReLU"]
    for name, (images, codecs, shards) in WAYS.items():
        folder = tempfile.mkdtemp()
        array = zarr.create_array(
            f"{folder}/t.zarr", shape=values.shape, chunks=(images, *SHAPE), shards=shards, dtype="float32",
            compressors=codecs, fill_value=np.nan,
        )  # fmt: skip
        speeds = []
        for writing in (True, False):
            times = []
            for _ in range(3):
                started = time.perf_counter()
                for start in range(0, IMAGES, BATCH):
                    part = slice(start, start + BATCH)
                    if writing:
                        array[part] = values[part]
                    else:
                        array[part]
                times.append(time.perf_counter() - started)
            speeds.append(size / min(times))
        disk = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file()) / values.nbytes
        shutil.rmtree(folder)
        lines.append(f"{name:36} write {speeds[0]:.2f} GB/s   read {speeds[1]:.2f} GB/s   {disk:.2f} of the size")
        print(lines[-1], flush=True)
    (ROOT / "benchmarks" / "results" / "chunks.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
