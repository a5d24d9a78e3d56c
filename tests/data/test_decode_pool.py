"""Decoding in worker processes: results keep their order, and broken files don't stop the others."""

import contextlib
import dataclasses
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images
from threadpoolctl import threadpool_info

import convoy.data.cache
from convoy.data import decode_cache, decode_pool, decode_worker, near_duplicates
from convoy.data import image_io as images
from convoy.data.cache import CacheDir
from convoy.data.decode_cache import INDEX_FILE, RECORDS_FILE, DecodeCache, write_decode_cache
from convoy.data.decode_pool import _take_batch, decode_all
from convoy.data.decode_worker import BATCH_BYTES, Batch, decode_batch
from convoy.data.image_io import InvalidImageError, decode
from convoy.data.packed import pixel_shards
from convoy.data.packed.pixel_shards import NOT_STORED, SHARD_LIST, ShardWriter
from convoy.data.sources.base import Content, Sample, Source
from heic_image import HEIC

NOTHING = CacheDir(Path("nothing is remembered here"), Path("or here"))
PHOTOGRAPH = load_sample_images().images[0][100:148, 200:264]


def encode(pixels: np.ndarray, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def make_noise(seed: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size + seed % 3, 3), np.uint8)


def make_source(contents: list[Content]) -> Source:
    return Source(["cat"], len(contents), (Sample(str(n), "cat", "", "", c) for n, c in enumerate(contents)))


def decode_to_lists(contents: list[Content], longest_side: int = 512) -> tuple[list[str], list[np.ndarray | str]]:
    """The path and the pixels of each member, or why there are none."""
    paths, found = [], []
    for members, batch in decode_all(make_source(contents), longest_side, NOTHING):
        paths += [member.path for member in members]
        images = read_images(batch)
        found += [fault or images.pop(0) for fault in batch.faults]
    return paths, found


def read_images(batch: Batch, cache_dir: CacheDir = NOTHING) -> list[np.ndarray]:
    images, start = [], 0
    with contextlib.closing(DecodeCache.load(cache_dir)) as known:
        for record, size in zip(batch.records, batch.sizes.tolist(), strict=True):
            if record["offset"] == NOT_STORED:
                pixels = np.frombuffer(batch.pixels[start : (start := start + size)], np.uint8)
            else:
                pixels = known.pixels.read(int(record["offset"]), size)
            images.append(pixels.reshape([int(record[name]) for name in ("height", "width", "channels")]))
    assert start == len(batch.pixels)
    return images


def report_threads(contents: list[Content], longest_side: int, cache_dir: CacheDir, **limits: int) -> Batch:
    """As `decode_batch`, but the fault is the number of threads with which NumPy multiplies."""
    numbers = {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}
    return dataclasses.replace(
        decode_batch(contents, longest_side, cache_dir, **limits), faults=[f"threads: {numbers}"]
    )


def decode_first(contents: list[Content], longest_side: int, cache_dir: CacheDir, **limits: int) -> Batch:
    """As `decode_batch` where images are large: it takes the first of them only."""
    return decode_batch(contents[:2], longest_side, cache_dir, **limits)


def test_partially_read_batch_yields_each_image_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decode_pool, "decode_batch", decode_first)
    paths, found = decode_to_lists([encode(make_noise(number)) for number in range(7)])
    assert paths == [str(number) for number in range(7)]
    assert all(np.array_equal(image, make_noise(number)) for number, image in enumerate(found))


def test_processes_that_decode_have_one_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_pool, "decode_batch", report_threads)
    monkeypatch.setenv(decode_pool.THREADS_VARIABLE, "2")
    assert decode_to_lists([encode(make_noise(0))]) == (["0"], ["threads: {1}"])
    assert os.environ[decode_pool.THREADS_VARIABLE] == "2"


def test_files_bytes_and_pixels_are_decoded_in_order(tmp_path: Path) -> None:
    pictures = [make_noise(number) for number in range(60)]
    (tmp_path / "0.png").write_bytes(encode(pictures[0]))
    contents: list[Content] = [str(tmp_path / "0.png"), *map(encode, pictures[1:40]), *pictures[40:]]
    paths, found = decode_to_lists(contents)
    assert paths == [str(number) for number in range(60)]
    assert all(np.array_equal(one, other) for one, other in zip(found, pictures, strict=True))


def test_invalid_image_keeps_its_place_among_the_others(tmp_path: Path) -> None:
    contents = [
        encode(make_noise(1)),
        b"",
        InvalidImageError("has no label"),
        str(tmp_path / "gone.png"),
        encode(make_noise(2)),
    ]
    _, (first, *faults, last) = decode_to_lists(contents)
    assert faults == ["is empty", "has no label", "can't be read: No such file or directory"]
    assert np.array_equal(first, make_noise(1))
    assert np.array_equal(last, make_noise(2))


def test_file_above_the_size_limit_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(2**28 + 1)
    assert decode_to_lists([str(tmp_path / "huge.png")]) == (["0"], ["is larger than 256 MiB"])


@pytest.mark.parametrize("large", [bytes(2**20), np.zeros((1024, 1024, 1), np.uint8)], ids=["files", "pixels"])
def test_large_images_stay_within_the_memory_limit(large: Content) -> None:
    contents: list[Content] = [*map(encode, 300 * [make_noise(0)]), *200 * [large]]
    waiting = make_source(contents).samples
    assert len(_take_batch(waiting, 300)) == 300
    assert len(_take_batch(waiting, 300)) == BATCH_BYTES // 2**20
    assert len([*waiting]) == 200 - BATCH_BYTES // 2**20  # none is lost


def test_in_memory_pixels_are_reduced_to_the_requested_size() -> None:
    _, (image,) = decode_to_lists([make_noise(0, 64)], longest_side=32)
    assert isinstance(image, np.ndarray)
    assert max(image.shape) == 32


def test_recorded_fields_of_a_file_are_complete() -> None:
    batch = decode_batch([encode(make_noise(0, 64)), encode(make_noise(0, 64), "BMP")], 32, NOTHING)
    one, other = batch.records
    assert (one["source_height"], one["source_width"], one["height"], one["width"]) == (64, 64, 32, 32)
    assert one["sha256"] != other["sha256"]  # of the file
    assert one["pixel_hash"] == other["pixel_hash"]  # of the pixels
    assert one["phash"] == other["phash"]


def test_decode_worker_imports_no_large_library() -> None:
    large = {"hydra", "pandas", "pyarrow", "pydantic", "torch"}
    code = f"import sys, convoy.data.decode_worker; print(*{large} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


# Processes that die


def crash(contents: list[Content], longest_side: int, cache_dir: CacheDir, **limits: int) -> Batch:
    """Decode as `decode_batch`, but one image ends the process, as broken PNGs did, and another takes for ever."""
    if b"crash" in contents:
        os.kill(os.getpid(), signal.SIGSEGV)
    if b"hang" in contents:
        time.sleep(600)
    return decode_batch(contents, longest_side, cache_dir, **limits)


def test_image_that_crashes_or_hangs_its_decoder_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decode_pool, "decode_batch", crash)
    monkeypatch.setattr(decode_pool, "IMAGE_TIMEOUT_S", 2)
    pictures = [make_noise(number) for number in range(50)]
    contents: list[Content] = [encode(picture) for picture in pictures]
    contents[3], contents[45] = b"crash", b"hang"
    paths, found = decode_to_lists(contents)
    assert paths == [str(number) for number in range(50)]
    assert found[3] == "crashes its decoder"
    assert found[45] == "takes more than 2 seconds to decode"
    sound = [number for number in range(50) if number not in (3, 45)]
    assert all(np.array_equal(found[number], pictures[number]) for number in sound)


# Damage

FORMS = {form: encode(PHOTOGRAPH, form) for form in ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")} | {
    "progressive JPEG": encode(PHOTOGRAPH, "JPEG", progressive=True, quality=95),
    "TIFF in LZW": encode(PHOTOGRAPH, "TIFF", compression="tiff_lzw"),
    "lossless WEBP": encode(PHOTOGRAPH, "WEBP", lossless=True),
}
MORE_FORMS = FORMS | {form: encode(PHOTOGRAPH, form) for form in ("AVIF", "JPEG2000")} | {"HEIC": HEIC}
every_form = pytest.mark.parametrize("data", FORMS.values(), ids=FORMS)


def flip_bit(data: bytes, random: np.random.Generator) -> bytes:
    broken = bytearray(data)
    broken[random.integers(len(data))] ^= 1 << random.integers(8)
    return bytes(broken)


@every_form
def test_truncated_file_gives_no_wrong_pixels(data: bytes) -> None:
    random = np.random.default_rng(0)
    _, found = decode_to_lists([data[:end] for end in random.integers(len(data), size=400)])
    original = decode(data, 512).pixels
    wrong = [pixels for pixels in found if not isinstance(pixels, str) and not np.array_equal(pixels, original)]
    assert wrong == []
    assert sum(isinstance(fault, str) for fault in found) > 390


def test_png_with_a_flipped_bit_gives_no_wrong_pixels() -> None:
    random = np.random.default_rng(0)
    _, found = decode_to_lists([flip_bit(FORMS["PNG"], random) for _ in range(2000)])
    assert all(isinstance(pixels, str) or np.array_equal(pixels, PHOTOGRAPH) for pixels in found)


@pytest.mark.parametrize("data", MORE_FORMS.values(), ids=MORE_FORMS)
def test_flipped_bits_neither_crash_nor_hang_a_decoder(data: bytes) -> None:
    random = np.random.default_rng(0)
    _, found = decode_to_lists([flip_bit(flip_bit(data, random), random) for _ in range(600)])
    assert len(found) == 600
    assert not {"crashes its decoder", f"takes more than {decode_pool.IMAGE_TIMEOUT_S} seconds to decode"} & {
        fault for fault in found if isinstance(fault, str)
    }


def test_damage_that_a_jpeg_decoder_warns_of_is_an_error() -> None:
    random = np.random.default_rng(0)
    _, found = decode_to_lists([flip_bit(FORMS["progressive JPEG"], random) for _ in range(1000)])
    warned = [fault for fault in found if isinstance(fault, str) and "Corrupt JPEG data" in fault]
    assert len(warned) > 200  # Pillow passes nearly all of them


# What is remembered


def decode_and_keep(folder: Path, contents: list[Content]) -> Batch:
    batch = decode_batch(contents, 512, NOTHING)
    records = batch.records.copy()
    records["offset"] = np.cumsum(batch.sizes) - batch.sizes
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(ShardWriter(folder / "pixels", None)) as pixels:
        pixels.write(batch.records["pixel_hash"], batch.sizes, batch.records["offset"], batch.pixels)
    (folder / RECORDS_FILE).write_bytes(records.tobytes())
    write_decode_cache(folder / RECORDS_FILE, folder / "pixels", make_cache(folder).folder)
    return batch


def make_cache(folder: Path) -> CacheDir:
    return CacheDir(folder / "remembered" / "here", folder)


def never(data: bytes, longest_side: int) -> None:
    raise AssertionError("decoded again")


def test_decoded_images_are_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [encode(make_noise(number)) for number in range(9)]
    first = decode_and_keep(tmp_path / "first", contents)
    monkeypatch.setattr(decode_worker, "decode", never)
    again = decode_batch(contents[::-1], 512, make_cache(tmp_path / "first"))
    assert again.faults == [""] * 9
    assert (again.records["phash"] == first.records["phash"][::-1]).all()
    assert not again.pixels
    images = read_images(again, make_cache(tmp_path / "first"))
    assert all(np.array_equal(*pair) for pair in zip(images, read_images(first)[::-1], strict=True))


@given(order=st.lists(st.integers(0, 11), unique=True))
def test_cached_and_new_images_keep_the_requested_order(
    order: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("mixed")
    contents = [encode(make_noise(number)) for number in range(12)]
    decode_and_keep(folder / "first", contents[:6])
    batch = decode_batch([contents[number] for number in order], 512, make_cache(folder / "first"))
    images = read_images(batch, make_cache(folder / "first"))
    assert len(batch.pixels) == sum(make_noise(number).size for number in order if number >= 6)
    assert all(np.array_equal(image, make_noise(number)) for image, number in zip(images, order, strict=True))


@pytest.mark.parametrize("harm", ["a bit", "the end", "the file"])
def test_corrupt_cached_image_is_decoded_again(tmp_path: Path, harm: str) -> None:
    first = decode_and_keep(tmp_path / "spoiled", [encode(make_noise(1)), encode(make_noise(2))])
    earlier = make_cache(tmp_path / "spoiled")
    (shard,) = (file for file in (tmp_path / "spoiled/pixels").iterdir() if file.name != SHARD_LIST)
    if harm == "a bit":
        shard.write_bytes(flip_bit(shard.read_bytes(), np.random.default_rng(0)))
    elif harm == "the end":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        shard.unlink()
    again = decode_batch([encode(make_noise(1)), encode(make_noise(2))], 512, earlier)
    assert again.faults == ["", ""]
    assert again.pixels  # that one
    assert all(np.array_equal(*pair) for pair in zip(read_images(again, earlier), read_images(first), strict=True))


@pytest.mark.parametrize("name", [INDEX_FILE, SHARD_LIST])
def test_cache_without_disk_space_is_skipped(tmp_path: Path, name: str) -> None:
    decode_and_keep(tmp_path, [encode(make_noise(1))])
    (make_cache(tmp_path).folder / name).write_bytes(b"")
    assert len(decode_batch([encode(make_noise(1))], 512, make_cache(tmp_path)).pixels) == make_noise(1).size


@pytest.fixture
def files_read(monkeypatch: pytest.MonkeyPatch) -> list[Content]:
    """What is read from now on."""
    contents: list[Content] = []
    truly = decode_worker._read

    def noted(content: Content) -> tuple[bytes | np.ndarray, bytes]:
        contents.append(content)
        return truly(content)

    monkeypatch.setattr(decode_worker, "_read", noted)
    return contents


def test_file_is_reread_only_if_its_size_or_times_change(
    files_read: list[Content], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / "1.bmp", tmp_path / "2.bmp"]
    for number, file in enumerate(files, 1):
        file.write_bytes(encode(make_noise(number, 9), "BMP"))
    before, paths = files[1].stat(), [str(file) for file in files]
    monkeypatch.setattr(decode_worker, "SETTLED_NS", 0)
    decode_and_keep(tmp_path, [*paths])
    files_read.clear()
    assert decode_batch([*paths], 512, make_cache(tmp_path)).faults == ["", ""]
    assert files_read == []

    files[1].write_bytes(flip_bit(files[1].read_bytes(), np.random.default_rng(0)))
    os.utime(files[1], ns=(before.st_atime_ns, before.st_mtime_ns))  # as if nothing had happened
    assert files[1].stat().st_size == before.st_size
    decode_batch([*paths], 512, make_cache(tmp_path))
    assert files_read == [paths[1]]


def test_file_may_be_written_in_several_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, truly = tmp_path / "1.png", os.read
    file.write_bytes(encode(make_noise(1)))
    monkeypatch.setattr(decode_worker.os, "read", lambda file, size: truly(file, min(size, 100)))
    told = {name: getattr(file.stat(), name) for name in ("st_size", "st_mtime_ns", "st_ctime_ns")}
    monkeypatch.setattr(decode_worker.os, "fstat", lambda _: SimpleNamespace(**told, st_ino=2**64 - 1))
    monkeypatch.setattr(decode_worker, "SETTLED_NS", 0)
    assert decode_batch([str(file)], 512, NOTHING).faults == [""]


def test_recently_modified_file_is_read_again(files_read: list[Content], tmp_path: Path) -> None:
    file = tmp_path / "1.png"
    file.write_bytes(encode(make_noise(1)))
    decode_and_keep(tmp_path, [str(file)])
    decode_batch([str(file)], 512, make_cache(tmp_path))
    assert files_read == 2 * [str(file)]


def test_file_that_was_just_copied_with_its_time_is_read_again(files_read: list[Content], tmp_path: Path) -> None:
    file = tmp_path / "1.png"
    file.write_bytes(encode(make_noise(1)))
    os.utime(file, (0, 0))
    decode_and_keep(tmp_path, [str(file)])
    decode_batch([str(file)], 512, make_cache(tmp_path))
    assert files_read == 2 * [str(file)]


def test_cache_in_use_by_another_process_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def emptied_and_filled_again(folder: Path, ignore_errors: bool) -> None:
        (folder / "here").mkdir(parents=True)
        (folder / "here" / SHARD_LIST).write_bytes(b"others")

    monkeypatch.setattr(shutil, "rmtree", emptied_and_filled_again)
    decode_and_keep(tmp_path, [encode(make_noise(1))])
    assert len(decode_batch([encode(make_noise(1))], 512, make_cache(tmp_path)).pixels) == make_noise(1).size


def test_equal_bytes_of_another_shape_are_another_image() -> None:
    pixels = make_noise(0)
    shapes = [(8, 8, 3), (4, 16, 3), (16, 4, 3), (24, 8, 1)]
    records = decode_batch([pixels.reshape(shape) for shape in shapes], 512, NOTHING).records
    assert len(set(records["pixel_hash"].tolist())) == len(set(records["sha256"].tolist())) == len(shapes)


def test_file_modified_two_seconds_ago_is_not_trusted(
    files_read: list[Content], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "1.png"
    file.write_bytes(encode(make_noise(1)))
    monkeypatch.setattr(decode_worker.time, "time_ns", lambda: file.stat().st_ctime_ns + 2 * 10**9)
    decode_and_keep(tmp_path, [str(file)])
    decode_batch([str(file)], 512, make_cache(tmp_path))
    assert files_read == 2 * [str(file)]


@pytest.mark.parametrize(
    "module", [images, near_duplicates, pixel_shards, decode_cache, decode_worker], ids=lambda module: module.__name__
)
def test_images_decoded_by_other_code_are_not_reused(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = decode_worker.decoding_fingerprint(512)
    (tmp_path / "changed.py").write_text("# other code\n")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "changed.py"))
    assert decode_worker.decoding_fingerprint(512) != before


@pytest.mark.parametrize("library", ["numpy", "pillow", "simplejpeg", "xxhash"])
def test_images_of_another_library_version_are_not_reused(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = decode_worker.decoding_fingerprint(512)
    monkeypatch.setattr(convoy.data.cache, "version", lambda name: "0" if name == library else version(name))
    assert decode_worker.decoding_fingerprint(512) != before


def test_images_decoded_to_another_size_are_not_reused() -> None:
    assert decode_worker.decoding_fingerprint(512) != decode_worker.decoding_fingerprint(256)


def test_file_is_identified_by_its_complete_checksum(tmp_path: Path) -> None:
    batch = decode_and_keep(tmp_path, [encode(make_noise(1))])
    (sha256,) = batch.records["sha256"].tolist()
    with contextlib.closing(DecodeCache.load(make_cache(tmp_path))) as known:
        assert len(known.find([sha256])[0]) == 1
        assert len(known.find([sha256[:8] + bytes(24)])[0]) == 0
