"""Requests with images: a form with files (multipart/form-data, RFC 7578), within limits."""

from dataclasses import dataclass
from email.message import Message

from prompt_tuning_jax.serving.schema import PredictRequest, RefusedError

_MAX_BOUNDARY = 70  # RFC 2046
_MAX_HEADERS = 8192  # bytes of a part's headers
_MAX_TASK = 1000  # characters
_MEDIA_TYPE = "multipart/form-data"


@dataclass(frozen=True, kw_only=True)
class FormPart:
    """A field of a form, or a file with its name."""

    name: str
    content: bytes
    filename: str = ""


def image_request(
    body: bytes, content_type: str, *, most: int
) -> tuple[PredictRequest, list[bytes]]:
    """Returns the request of a form with at most ``most`` images, and their files.

    ``image`` fields are files, and an optional ``task`` is a task's name.
    """
    images: list[FormPart] = []
    task = ""
    for part in form_parts(body, content_type, most=most + 1):
        if part.name == "image":
            images.append(part)
        elif part.name == "task" and not part.filename:
            task = part.content.decode("utf-8", "replace")[:_MAX_TASK]
        else:
            raise RefusedError(422, f"unknown field {part.name[:40]!r}; send image and task")
    if not images:
        raise RefusedError(
            422, "there is no image; send files in fields of this name", field="image"
        )
    if len(images) > most:
        raise RefusedError(413, f"{len(images)} images; at most {most} fit", field="image")
    names = [part.filename[:_MAX_TASK] or f"image[{n}]" for n, part in enumerate(images)]
    request = PredictRequest(task=task, inputs=[*names])
    return request, [part.content for part in images]


def form_parts(body: bytes, content_type: str, *, most: int) -> list[FormPart]:
    """Returns the parts of a form, at most ``most``; RefusedError for any other body."""
    header = Message()
    header["content-type"] = content_type
    boundary = header.get_param("boundary")
    if header.get_content_type() != _MEDIA_TYPE or not isinstance(boundary, str):
        raise _refused(f"the content type is {content_type[:100] or 'missing'}; send {_MEDIA_TYPE}")
    try:
        mark = b"--" + boundary.encode("ascii")
    except UnicodeEncodeError:
        raise _refused("the boundary has letters beyond ASCII") from None
    if not boundary or len(boundary) > _MAX_BOUNDARY:
        raise _refused(f"the boundary has {len(boundary)} characters; 1 to {_MAX_BOUNDARY} do")
    # A boundary starts a line; the first one may start the body.
    pieces = (b"\r\n" + body).split(b"\r\n" + mark, most + 2)
    if len(pieces) > most + 2:
        raise RefusedError(413, f"more than {most} parts", field="body")
    if len(pieces) < 2 or pieces[-1][:2] != b"--":
        raise _refused("the form does not end with its boundary")
    return [_part(piece) for piece in pieces[1:-1]]


def _part(piece: bytes) -> FormPart:
    line, _, rest = piece.partition(b"\r\n")
    head, separator, content = (b"\r\n" + rest).partition(b"\r\n\r\n")
    if line.strip() or not separator or len(head) > _MAX_HEADERS:
        raise _refused("a part of the form has no headers")
    header = Message()
    for field in head.decode("utf-8", "replace").split("\r\n"):
        name, colon, value = field.partition(":")
        if colon and name.lower() == "content-disposition":
            header["content-disposition"] = value.strip()
    named = header.get_param("name", header="content-disposition")
    if header.get_content_disposition() != "form-data" or not isinstance(named, str):
        raise _refused("a part of the form has no name")
    filename = header.get_param("filename", "", header="content-disposition")
    return FormPart(
        name=named, content=content, filename=filename if isinstance(filename, str) else ""
    )


def _refused(message: str) -> RefusedError:
    return RefusedError(422, message, field="body")
