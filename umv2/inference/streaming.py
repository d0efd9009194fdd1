"""From ids to text, as it arrives."""

from collections.abc import Sequence

from umv2.data.tokenizers import Tokenizer

# What decoders write for bytes that are not, or not yet, a character.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Turns ids that continue a context into text, as soon as it is certain.

    A token may end within a character, and a tokenizer may write a token differently at the start
    of a text, so each piece is the difference that its tokens make to those before them. Text that
    may be the beginning of a stop string waits until it is known not to be.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], stop: Sequence[str] = ()):
        """Takes the ids that stand before, and strings that end the text and are left out."""
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._settled, self._pending = list(context), list[int]()
        self._incomplete = self._held = ""

    def push(self, token: int) -> str:
        """Returns the text that one more id makes certain; "" after a stop string."""
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
        """Returns what was still waiting."""
        if self.stopped:
            return ""
        rest = self._release(self._held + self._incomplete)
        held, self._held = self._held, ""
        return rest + held

    def _release(self, text: str) -> str:
        """Returns `text` up to the first stop string or what may become one, which is held."""
        ends = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        begun = [
            length
            for stop in self._stop
            for length in range(1, len(stop))
            if text.endswith(stop[:length])
        ]
        certain = len(text) - max(begun, default=0)
        self._held = text[certain:]
        return text[:certain]
