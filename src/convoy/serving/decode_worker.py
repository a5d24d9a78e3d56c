"""Decode worker: a process that decodes images, which a broken image may crash or block.

It is started with a socket, reads batches of images from it, and writes their pixels. It ends when the socket is
closed, also where the process at the other end was killed.
"""

import io
import json
import resource
import signal
import socket
import stat
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from convoy.core.malloc import keep_memory
from convoy.data import image_io
from convoy.data.image_io import InvalidImageError

# A message is the length of its head, its head (JSON) and the length of its body, and then its body.
LENGTHS = struct.Struct("<II")
# The most that one call receives.
CHUNK_BYTES = 1 << 18
# An image of `image_io.MAX_PIXELS` pixels with transparency takes 2 GB while it is decoded.
MAX_MEMORY = 6 << 30
# Files with more bytes are rejected and not read into memory.
MAX_FILE_BYTES = 256 << 20


def main() -> None:
    """Decode batches until the socket, whose number is the only argument, is closed."""
    # Ctrl-C is sent to the whole process group. The parent process ends this one by closing the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY if hard == resource.RLIM_INFINITY else hard, hard))
    keep_memory()
    _warm_up()
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        connection.setblocking(True)
        connection.sendall(LENGTHS.pack(0, 0))
        while received := receive_message(connection):
            errors, pixels = decode_batch(*received)
            answer = json.dumps(errors).encode()
            lengths = LENGTHS.pack(len(answer), sum(image.nbytes for image in pixels))
            connection.sendall(b"".join([lengths, answer, *(image.tobytes() for image in pixels)]))


def _warm_up() -> None:
    """Decode a small image of each kind, as Pillow loads its decoders when it first needs them, in 50 ms."""
    for kind in ("PNG", "JPEG", "WEBP"):
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, kind)
        preprocess(file.getvalue(), longest_side=8, size=4, channels=3)


def receive_message(connection: socket.socket) -> tuple[dict, memoryview] | None:
    """Receive the head and the body of a message, or None if the socket was closed."""
    received = bytearray()
    size = LENGTHS.size
    head_size = 0
    # One call receives all of a small message.
    while len(received) < size or not head_size:
        part = connection.recv(CHUNK_BYTES)
        if not part:
            return None
        received += part
        if not head_size and len(received) >= LENGTHS.size:
            head_size, body_size = LENGTHS.unpack_from(received)
            size += head_size + body_size
    start = LENGTHS.size + head_size
    return json.loads(received[LENGTHS.size : start]), memoryview(received)[start:]


def decode_batch(head: dict, body: memoryview) -> tuple[list[str], list[np.ndarray]]:
    """Decode a batch of images.

    Args:
        head: The arguments of `preprocess`, and either `sizes`, the lengths of the files in `body`, or `paths`.
        body: The files, end to end.

    Returns:
        For each image the reason why it can't be used, or ""; and the pixels of the valid images.
    """
    longest_side, size, channels = head["spec"]
    errors, pixels = [], []
    start = 0
    for item in head.get("paths") or head["sizes"]:
        try:
            if isinstance(item, str):
                data = read_file(Path(item))
            else:
                data = bytes(body[start : start + item])
                start += item
            pixels.append(preprocess(data, longest_side, size, channels))
            errors.append("")
        except InvalidImageError as fault:
            errors.append(str(fault))
        except MemoryError:
            errors.append("takes too much memory to decode")
    return errors, pixels


def preprocess(data: bytes, longest_side: int, size: int, channels: int) -> np.ndarray:
    """Decode an image file and resize it to the network's input (size, size, channels) uint8, as in training."""
    return image_io.center_crop_resize(image_io.decode(data, longest_side).pixels, size, channels)


def read_file(path: Path) -> bytes:
    """Read an image file.

    Raises:
        InvalidImageError: If it is no file, too large, or can't be read.
    """
    try:
        # Not `exists`, which is also false for a file in a folder that may not be read.
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise InvalidImageError("is a folder without images")
        # Reading a pipe or a device might never end.
        if not stat.S_ISREG(status.st_mode):
            raise InvalidImageError("is not a file")
        if status.st_size > MAX_FILE_BYTES:
            raise InvalidImageError(f"is larger than {MAX_FILE_BYTES >> 20} MiB")
        return path.read_bytes()
    except FileNotFoundError:
        raise InvalidImageError("does not exist") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InvalidImageError(f"can't be read: {reason}") from None


def pack_request(spec: Sequence[int], images: Sequence[bytes | str]) -> bytes:
    """Return the message that asks for a batch of images, given as files' contents or as paths.

    Args:
        spec: The arguments of `preprocess` after the first.
        images: Contents of files, or paths.
    """
    files = [image for image in images if isinstance(image, bytes)]
    key: dict[str, list] = {"sizes": [len(file) for file in files]} if files else {"paths": list(images)}
    head = json.dumps({"spec": list(spec), **key}).encode()
    return b"".join([LENGTHS.pack(len(head), sum(map(len, files))), head, *files])


if __name__ == "__main__":
    main()
