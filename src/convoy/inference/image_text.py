"""Image files as text: in base64, or as `data:` URIs."""

import base64
import binascii
import urllib.parse

from convoy.data.image_io import InvalidImageError


def decode_text(text: str) -> bytes:
    """Decode the text of an image file, in base64 or as a `data:` URI.

    Raises:
        InvalidImageError: If the text is neither.
    """
    try:
        if text[:5].lower() == "data:":
            return _decode_data_uri(text)
        return _decode_base64(text)
    # Includes `binascii.Error`, and the error for text that is not ASCII.
    except ValueError:
        raise InvalidImageError("is text, but not the base64 of an image file") from None


def _decode_data_uri(uri: str) -> bytes:
    head, comma, content = uri.partition(",")
    if not comma:
        raise InvalidImageError("is a data: URI without a comma")
    if head.lower().endswith(";base64"):
        return _decode_base64(urllib.parse.unquote(content))
    return urllib.parse.unquote_to_bytes(content)


def _decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    # Base64 text is often broken into lines.
    except binascii.Error:
        return base64.b64decode("".join(text.split()), validate=True)
