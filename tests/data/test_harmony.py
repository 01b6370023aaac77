"""Harmony's parser: valid streams, malformed ones, and random ones of which no text may be lost."""

import random
import re
from functools import lru_cache
from types import SimpleNamespace

import pytest

from sparselong.data import Message, Parser, read_marks
from sparselong.errors import StageError

MARKS = ("start", "end", "message", "channel", "constrain", "return", "call")
CALL = "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"


@pytest.fixture(scope="module")
def marks(harmony_tokenizer):
    return read_marks(harmony_tokenizer)


@pytest.fixture(scope="module")
def parse(harmony_tokenizer, marks):
    """Return a function that parses a text or token ids."""

    def call(stream):
        if isinstance(stream, str):
            stream = harmony_tokenizer.encode(stream, add_special_tokens=False)
        return feed(Parser(harmony_tokenizer, marks), stream)

    return call


def feed(parser, ids):
    """Return a parser that has read the ids, after comparing what it returned to its messages."""
    deltas = [delta for token in ids for delta in parser.feed(token)]
    deltas += parser.close()
    assert parser.close() == []
    assert all(delta.text for delta in deltas)
    parts = [(delta.channel, delta.recipient, c) for delta in deltas for c in delta.text]
    assert parts == [(m.channel, m.recipient, c) for m in parser.messages for c in m.text]
    return parser


def test_marks_are_the_tokenizers_ids(harmony_tokenizer, marks):
    wanted = [harmony_tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in MARKS]
    assert list(marks) == wanted and marks.return_ == harmony_tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("stream", "messages", "ended_by"),
    [
        ("<|channel|>final<|message|>Hi 🙂.<|return|>", [("final", "Hi 🙂.")], "return"),
        (
            "<|channel|>analysis<|message|>Hm.<|end|>"
            "<|start|>assistant<|channel|>final<|message|>So.<|return|>",
            [("analysis", "Hm."), ("final", "So.")],
            "return",
        ),
        (
            f'{CALL}{{"a": 1}}<|call|>',
            [("commentary", '{"a": 1}', "functions.get_weather", "json")],
            "call",
        ),
        (
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant to=functions.x"
            "<|channel|>commentary json<|message|>{}<|call|>",
            [("analysis", "Hm."), ("commentary", "{}", "functions.x", "json")],
            "call",
        ),
        (
            " to=functions.x<|channel|>commentary<|message|>{}<|call|>",
            [("commentary", "{}", "functions.x")],
            "call",
        ),
        (
            "<|channel|>analysis to=python code<|message|>1<|call|>",
            [("analysis", "1", "python", "code")],
            "call",
        ),
        (
            "<|channel|>commentary<|message|>I look.<|end|>"
            "<|start|>assistant<|channel|>commentary to=all<|message|>Now.<|end|>",
            [("commentary", "I look."), ("commentary", "Now.")],
            "end",
        ),
        (
            "<|channel|>final <|constrain|>json<|message|>{}<|return|>",
            [("final", "{}", None, "json")],
            "return",
        ),
        ("<|channel|>final<|message|><|return|>", [("final", "")], "return"),
        ("<|channel|>final<|message|>Cut", [("final", "Cut")], None),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b",
            [("analysis", "a"), ("final", "b")],
            None,
        ),
        ("", [], None),
    ],
)
def test_valid_streams(parse, stream, messages, ended_by):
    parser = parse(stream)
    assert parser.messages == [Message(*message) for message in messages]
    assert (parser.ended_by, +parser.repairs) == (ended_by, {})


@pytest.mark.parametrize(
    ("stream", "messages", "repairs"),
    [
        (
            "<|start|>assistant<|channel|>analysis<|message|>Hm.",
            ["analysis:Hm."],
            ["doubled role"],
        ),
        (
            "assistant<|channel|>analysis<|message|>Hm.",
            ["final:assistant", "analysis:Hm."],
            ["doubled role"],
        ),
        (
            "<|channel|>final<|message|>a<|end|><|start|>assistant<|start|>assistant"
            "<|channel|>final<|message|>b",
            ["final:a", "final:assistant", "final:b"],
            ["doubled role"],
        ),
        (
            "<|channel|>final<|message|>a<|end|><|start|>user<|message|>b<|return|>",
            ["final:a", "final:user", "final:b"],
            ["unknown role"],
        ),
        ("<|channel|>thoughts<|message|>a", ["final:thoughts", "final:a"], ["unknown channel"]),
        ("<|channel|><|message|>a", ["final:a"], ["unknown channel"]),
        (
            "<|channel|>commentary to=x<|channel|>commentary to=x<|message|>a",
            ["final:commentary to=x", "commentary:a"],
            ["doubled channel"],
        ),
        (
            " to=a<|channel|>commentary to=b<|message|>c",
            ["final: to=acommentary to=b", "final:c"],
            ["contradictory header"],
        ),
        (
            "<|channel|>final <|constrain|>two words<|message|>a",
            ["final:final two words", "final:a"],
            ["unknown content type"],
        ),
        ("<|channel|>analysis<|end|>", ["final:analysis"], ["header without <|message|>"]),
        (
            "<|channel|>analysis We see.<|end|><|start|>assistant<|channel|>final<|message|>a",
            ["final:analysis We see.", "final:a"],
            ["unknown channel"],
        ),
        ("<|message|>a<|return|>", ["final:a"], ["header without a channel"]),
        (" to=functions.f<|message|>a", ["commentary:a"], ["header without a channel"]),
        ("Just text.<|return|>", ["final:Just text."], ["text before a header"]),
        (
            "Hm.<|channel|>final<|message|>a",
            ["final:Hm.", "final:a"],
            ["text before a header"],
        ),
        (
            "<|channel|>analysis<|message|>a<|end|>b<|start|>assistant<|channel|>final<|message|>c",
            ["analysis:a", "final:b", "final:c"],
            ["text outside a message"],
        ),
        (
            "<|channel|>analysis<|message|>a<|end|><|message|>b",
            ["analysis:a", "final:b"],
            ["message without a header"],
        ),
        (
            "<|channel|>analysis<|message|>a<|channel|>final<|message|>b",
            ["analysis:a", "final:b"],
            ["message without <|start|>"],
        ),
        (
            "<|channel|>analysis<|message|>a<|start|>assistant<|channel|>final<|message|>b",
            ["analysis:a", "final:b"],
            ["message without <|end|>"],
        ),
        (
            "<|channel|>analysis<|message|>a<|message|>b<|constrain|>c<|end|><|end|>",
            ["analysis:abc"],
            ["stray mark"] * 3,
        ),
        ("<|channel|>final<|message|>a<|call|>", ["final:a"], ["call without a recipient"]),
        ("<|channel|>final<|message|>a<|endoftext|>", ["final:a<|endoftext|>"], ["special token"]),
        ("<|channel|>anal", ["final:anal"], ["truncated header"]),
        ("<|channel|>final<|message|>a<|end|><|start|>", ["final:a"], ["truncated header"]),
        ("<|return|>", [], ["header without <|message|>"]),
    ],
)
def test_malformed_streams(parse, stream, messages, repairs):
    parser = parse(stream)
    assert [f"{message.channel}:{message.text}" for message in parser.messages] == messages
    assert sorted(parser.repairs.elements()) == sorted(repairs)
    assert not any(message.recipient for message in parser.messages if message.channel == "final")


def test_text_without_a_header_is_not_held_back(harmony_tokenizer, marks):
    parser = Parser(harmony_tokenizer, marks)
    ids = harmony_tokenizer.encode("Good morning to all of you.", add_special_tokens=False)
    assert all(parser.feed(token) for token in ids)


def test_characters_are_emitted_once_whole(harmony_tokenizer, marks):
    ids = harmony_tokenizer.encode("<|channel|>final<|message|>", add_special_tokens=False)
    parser, smile = Parser(harmony_tokenizer, marks), as_bytes("🙂".encode(), harmony_tokenizer)
    assert len(smile) == 4 and not any(parser.feed(token) for token in [*ids, *smile[:3]])
    assert [delta.text for delta in parser.feed(smile[3])] == ["🙂"]
    parser.feed(smile[0])
    assert [delta.text for delta in parser.close()] == ["\ufffd"]
    assert parser.repairs == {"incomplete character": 1}


def test_ids_beyond_the_vocabulary_are_counted(harmony_tokenizer, marks, parse):
    ids = harmony_tokenizer.encode("<|channel|>final<|message|>ab", add_special_tokens=False)
    parser = parse([*ids[:-1], len(harmony_tokenizer) + 7, ids[-1]])
    assert [message.text for message in parser.messages] == ["ab"]
    assert parser.repairs == {"token without text": 1}


def test_tokenizer_of_another_model_is_refused(harmony_tokenizer):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    plain = Tokenizer(models.BPE({"a": 0}, []))
    with pytest.raises(StageError, match="no <|start|>, .*<|call|>"):
        read_marks(SimpleNamespace(backend_tokenizer=plain, name_or_path="other"))
    words = Tokenizer(models.WordLevel({"naïve": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.WordPiece()
    words.add_special_tokens([f"<|{name}|>" for name in MARKS])
    with pytest.raises(StageError, match="byte-level"):
        read_marks(SimpleNamespace(backend_tokenizer=words, name_or_path="other"))


# Random streams. Fragments are mixed so that valid headers are as frequent as broken ones.
SPECIAL = tuple(f"<|{name}|>" for name in MARKS)
WORDS = (
    *("assistant", " assistant", "user", "analysis", "commentary", "final", "thoughts", "json"),
    *(" to=functions.f", " to=all", " to=", " json", " ", "\n", "Größe 🙂", "Hello there", "to"),
    *(b"\xf0\x9f", b"\x99\x82", b"\xff", "\ufffd", "<|endoftext|>"),
)
FRAGMENTS = (
    *("<|start|>assistant", "<|channel|>final<|message|>", "<|channel|>analysis<|message|>", CALL),
    *("<|end|><|start|>assistant", "<|start|>assistant to=functions.f<|channel|>commentary"),
)


@lru_cache(1)
def byte_names():
    """Return the vocabulary's name of each byte, from the characters that byte-level allows."""
    from tokenizers import pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    visible = {ord(character): character for character in alphabet if ord(character) < 256}
    hidden = [byte for byte in range(256) if byte not in visible]
    return visible | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def as_bytes(data, tokenizer):
    """Return a token for each byte."""
    return tokenizer.convert_tokens_to_ids([byte_names()[byte] for byte in data])


def random_stream(draw, tokenizer, cut):
    """Return token ids; with `cut`, ordinary text is a token for each byte."""
    ids = []
    for _ in range(draw.randint(1, 24)):
        piece = draw.choice(draw.choice((SPECIAL, WORDS, FRAGMENTS)))
        for part in re.split(r"(<\|\w+\|>)", piece) if isinstance(piece, str) else [piece]:
            if isinstance(part, bytes) or (cut and not part.startswith("<|")):
                data = part if isinstance(part, bytes) else part.encode()
                ids += as_bytes(data, tokenizer)
            else:
                ids += tokenizer.encode(part, add_special_tokens=False)
    return ids


NAME = r"[!-~]+"
CHANNEL = rf"C\s*(?:analysis|commentary|final)(?:\s+to=({NAME}))?(?:\s+([a-z]\w*))?\s*"
TYPE = rf"(?:K\s*({NAME})\s*)?"
VALID = re.compile(
    rf"S\s*assistant(?:\s+to=({NAME}))?\s*(?:{CHANNEL})?{TYPE}M|{CHANNEL}{TYPE}M".translate(
        {ord(letter): chr(0xE000 + i) for i, letter in enumerate("SEMCKRL")}
    )
)


def text_outside_headers(ids, tokenizer, marks):
    """Return all text of a stream except for that of valid headers, found in the whole of it."""
    signs = {token: chr(0xE000 + i) for i, token in enumerate(marks)}
    stream, run = f"{signs[marks.start]}assistant", []
    for token in [*ids, None]:
        if token in signs or token is None:
            stream += tokenizer.decode(run) + signs.get(token, "")
            run = []
        else:
            run.append(token)

    def leave(match):
        to1, to2, type1, type2, to3, type3, type4 = match.groups()
        valid = len({to1, to2, None}) < 3 and len({type1, type2, None}) < 3
        valid &= len({type3, type4, None}) < 3
        return "" if valid else match[0]

    first = VALID.match(stream)
    given = len("assistant") if first is None or leave(first) else 0
    kept = re.sub("[\ue000-\ue006]", "", VALID.sub(leave, stream))
    return kept[given:]


def test_no_text_of_random_streams_is_lost(harmony_tokenizer, marks, parse):
    lengths, valid = 0, 0
    for seed in range(500):
        ids = random_stream(random.Random(seed), harmony_tokenizer, cut=False)
        parser = parse(ids)
        text = "".join(message.text for message in parser.messages)
        assert text == text_outside_headers(ids, harmony_tokenizer, marks), seed
        assert {message.channel for message in parser.messages} <= {
            *("analysis", "commentary", "final")
        }
        lengths += len(text)
        valid += any(message.channel != "final" for message in parser.messages)
    assert lengths > 10_000 and valid > 200  # the streams are neither all noise nor all valid


def test_result_does_not_depend_on_how_text_is_cut(harmony_tokenizer, parse):
    for seed in range(200):
        whole, cut = (
            parse(random_stream(random.Random(seed), harmony_tokenizer, cut=cut))
            for cut in (False, True)
        )
        assert whole.messages == cut.messages, seed
        assert (whole.repairs, whole.ended_by) == (cut.repairs, cut.ended_by), seed


def test_messages_may_be_read_at_any_time(harmony_tokenizer, marks, parse):
    for seed in range(100):
        ids = random_stream(random.Random(seed), harmony_tokenizer, cut=False)
        parser, shown = Parser(harmony_tokenizer, marks), ""
        for token in ids:
            shown += "".join(delta.text for delta in parser.feed(token))
            assert shown == "".join(message.text for message in parser.messages)
        parser.close()
        assert parser.messages == parse(ids).messages


def test_any_token_ids_are_read(harmony_tokenizer, marks, parse):
    for seed in range(50):
        draw = random.Random(seed)
        ids = [draw.randrange(len(harmony_tokenizer) + 20) for _ in range(40)]
        wanted = text_outside_headers(
            [i for i in ids if i < len(harmony_tokenizer)], harmony_tokenizer, marks
        )
        assert "".join(message.text for message in parse(ids).messages) == wanted
