"""Streaming detokenization: from ids to text, one id at a time."""

from collections.abc import Sequence

from umv2.data.tokenizers import Tokenizer

# What tokenizers decode incomplete or invalid UTF-8 to.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decodes the ids that follow a context to text, as soon as the text is final.

    A token may end inside a character, and may decode differently at the start of a text. So each
    piece of text is the difference between decoding with and without the new tokens. Text that may
    be the start of a stop string is held back until it is known not to be.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], stop: Sequence[str] = ()):
        """Takes the ids of the context, and strings that end the text and are not part of it."""
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._settled, self._pending = list(context), list[int]()
        self._incomplete = self._held = ""

    def push(self, token: int) -> str:
        """Adds an id and returns the text that becomes final; "" after a stop string."""
        if self.stopped:
            return ""
        self._pending.append(token)
        decode = self._tokenizer.decode
        text = decode(self._settled + self._pending)[len(decode(self._settled)) :]
        if not text or text.endswith(_REPLACEMENT):
            self._incomplete = text
            return ""
        self._settled, self._pending, self._incomplete = self._pending, [], ""
        return self._release(self._held + text)

    def finish(self) -> str:
        """Returns the text that was held back."""
        if self.stopped:
            return ""
        rest = self._release(self._held + self._incomplete)
        held, self._held = self._held, ""
        return rest + held

    def _release(self, text: str) -> str:
        """Returns `text` up to the first stop string; holds back a suffix that may start one."""
        ends = [start for stop in self._stop if (start := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        overlaps = [
            length
            for stop in self._stop
            for length in range(1, len(stop))
            if text.endswith(stop[:length])
        ]
        end = len(text) - max(overlaps, default=0)
        self._held = text[end:]
        return text[:end]
