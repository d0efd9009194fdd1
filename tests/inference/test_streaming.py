"""Text decoded from ids incrementally."""

import pytest

from umv2.data.tokenizers import ByteTokenizer, Ids
from umv2.inference.streaming import TextStream

TOKENIZER = ByteTokenizer()


def pieces(text: bytes, *stop: str) -> list[tuple[int, str]]:
    """Returns (number of bytes consumed, text) per piece; the final flush counts one more byte."""
    stream = TextStream(TOKENIZER, [], stop)
    arrived = [(count, stream.push(byte)) for count, byte in enumerate(text, start=1)]
    arrived.append((len(text) + 1, stream.finish()))
    return [(count, piece) for count, piece in arrived if piece]


def test_text_arrives_in_complete_characters() -> None:
    script = "aé€".encode() + b"\xff" + "😀b".encode() + b"\xe2\x82"
    arrived = pieces(script)
    # An invalid byte waits for the next complete character; an incomplete one ends the text.
    assert arrived == [(1, "a"), (3, "é"), (6, "€"), (11, "\ufffd😀"), (12, "b"), (15, "\ufffd")]
    assert "".join(piece for _, piece in arrived) == TOKENIZER.decode(list(script))


def test_a_piece_keeps_the_space_that_a_decoder_drops_at_the_start_of_text() -> None:
    class Words(ByteTokenizer):
        def decode(self, ids: Ids) -> str:
            return " ".join(f"w{i}" for i in ids)

    stream = TextStream(Words(), [7])
    assert [stream.push(8), stream.push(9)] == [" w8", " w9"]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        # A possible start of a stop string waits, and follows if it does not become one.
        ("a\nb", ("\n\n",), [(1, "a"), (3, "\nb")]),
        ("a\n\nb", ("\n\n",), [(1, "a")]),
        ("ab", ("abc",), [(3, "ab")]),
        ("xaab!", ("ab!",), [(1, "x"), (3, "a")]),
        # The first match in the text counts, in any order of the stop strings.
        ("a.b;", (";", "."), [(1, "a")]),
        ("endless", ("end",), []),
    ],
)
def test_a_stop_string_ends_the_text_and_is_omitted(
    text: str, stop: tuple[str, ...], expected: list[tuple[int, str]]
) -> None:
    assert pieces(text.encode(), *stop) == expected
    stream = TextStream(TOKENIZER, [], stop)
    for byte in text.encode():
        stream.push(byte)
    assert stream.stopped == any(one in text for one in stop)
