"""The images in the body of a request: as a file, a form of files, or base64 in JSON."""

import json
from collections.abc import Sequence
from typing import Any

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from convoy.data.image_io import InvalidImageError
from convoy.inference.image_text import decode_text

# The content of an image file, or why it can't be used.
Received = bytes | InvalidImageError

ACCEPTED = "send image/*, application/octet-stream, multipart/form-data or application/json"


class RequestError(Exception):
    """A request that is refused.

    Args:
        status: The HTTP status.
        reason: What is wrong and how to fix it, without any of the request's content.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


def parse_images(content_type: str, body: bytes, max_images: int) -> list[Received]:
    """Return the images in the body of a request.

    Args:
        content_type: The header Content-Type.
        body: The body.
        max_images: The largest number of images.

    Raises:
        RequestError: If the content type is not supported, the body is malformed, or it has too many images.
    """
    kind, options = parse_options_header(content_type)
    if kind == b"multipart/form-data":
        images: Sequence[Received] = _parse_form(options.get(b"boundary"), body, max_images)
    elif kind == b"application/json":
        images = _parse_json(body, max_images)
    elif kind.startswith(b"image/") or kind == b"application/octet-stream":
        images = [body]
    else:
        raise RequestError(415, f"this content type is not supported: {ACCEPTED}")
    return list(images)


def check_count(count: int, max_images: int) -> None:
    """Raise `RequestError` if there are too many images."""
    if count > max_images:
        raise RequestError(413, f"more than {max_images} images: send them in several requests")


class _FormFiles:
    """Collects the files of a form, as the callbacks of a parser."""

    def __init__(self, max_images: int) -> None:
        self.files: list[bytes] = []
        self.is_complete = False
        self._max_images = max_images
        self._header = [b"", b""]
        self._disposition = b""
        self._parts: list[bytes] = []

    def on_part_begin(self) -> None:
        self._disposition = b""
        self._parts = []

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header[0] += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1] += data[start:end]

    def on_header_end(self) -> None:
        if self._header[0].lower() == b"content-disposition":
            self._disposition = self._header[1]
        self._header = [b"", b""]

    def on_headers_finished(self) -> None:
        if b"filename" not in parse_options_header(self._disposition)[1]:
            raise RequestError(
                422, "a field of the form is no file: send each image as a file, as in curl -F file=@cat.jpg"
            )
        check_count(len(self.files) + 1, self._max_images)

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._parts.append(data[start:end])

    def on_part_end(self) -> None:
        self.files.append(b"".join(self._parts))

    def on_end(self) -> None:
        self.is_complete = True


def _parse_form(boundary: bytes | None, body: bytes, max_images: int) -> list[bytes]:
    if not boundary:
        raise RequestError(422, "the content type multipart/form-data has no boundary")
    form = _FormFiles(max_images)
    names = [name for name in dir(form) if name.startswith("on_")]
    try:
        parser = MultipartParser(boundary, {name: getattr(form, name) for name in names})  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise RequestError(422, "the form is malformed") from None
    # A form without a part is just its last boundary.
    if not form.is_complete and body.strip() != b"--" + boundary + b"--":
        raise RequestError(422, "the form is incomplete: its last boundary is missing")
    return form.files


def _parse_json(body: bytes, max_images: int) -> list[Received]:
    try:
        found = json.loads(body)
    # Deeply nested lists raise `RecursionError`.
    except (ValueError, RecursionError):
        raise RequestError(422, "the body is not valid JSON") from None
    if isinstance(found, dict):
        if set(found) != {"images"}:
            raise RequestError(422, 'the object must have one key, "images"')
        found = found["images"]
    images = found if isinstance(found, list) else [found]
    if not isinstance(found, str | list) or not all(isinstance(image, str) for image in images):
        raise RequestError(422, "images must be a text or a list of texts: image files in base64, or data: URIs")
    check_count(len(images), max_images)
    return [_decode(image) for image in images]


def _decode(text: str) -> Received:
    try:
        return decode_text(text)
    except InvalidImageError as fault:
        return fault


def describe_body() -> dict[str, Any]:
    """Describe the accepted bodies in OpenAPI's words."""
    text = {"type": "string", "description": "an image file in base64, or a data: URI"}
    binary = {"type": "string", "format": "binary"}
    many = {"type": "array", "items": text}
    form = {"type": "object", "properties": {"file": {"type": "array", "items": binary}}}
    listed = {"type": "object", "required": ["images"], "properties": {"images": many}}
    content = {
        "multipart/form-data": {"schema": form},
        "application/json": {"schema": {"oneOf": [listed, many, text]}},
        "image/*": {"schema": binary},
        "application/octet-stream": {"schema": binary},
    }
    return {"requestBody": {"required": True, "content": content}}
