"""A model's own chat template: ids as transformers has them, typed markers stay words, sampled ids stay as they are."""

import json
from pathlib import Path

import pytest
import tokenizers

from duplex_jax.chat import ChatTemplate
from duplex_jax.data.encode import encode_chat
from duplex_jax.errors import UserError
from duplex_jax.template import Code, default_template, make_template, missing_tokens
from duplex_jax.tokenizer import HFTokenizer, Tokenizer, decode, load_tokenizer
from tests.tiny import byte_tokenizer

LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA_3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
TALK = [("system", "Be brief."), ("user", "Hi there"), ("assistant", "Hello!"), ("user", "Who are you?")]


def llama_3(folder: Path) -> Tokenizer:
    """A byte-level vocabulary with Llama 3's control tokens and chat template, as a folder has it."""
    spec = json.loads(json.dumps(byte_tokenizer().spec))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec["added_tokens"] = [
        {"id": 256 + i, "content": t, **flags, "special": True} for i, t in enumerate(LLAMA_3_TOKENS)
    ]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "chat_template": LLAMA_3,
    }
    HFTokenizer(spec, config=config).save(folder)
    return load_tokenizer(folder)


def spm_folder(folder: Path, scheme: str, template: str = MISTRAL) -> Path:
    """What transformers 5 saves of a SentencePiece model: `tokenizer.json` alone, with a space before texts."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abdehilmnorstuw", "he", "▁he", "▁t"]
    spec = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={p: i for i, p in enumerate(pieces)},
            merges=[("h", "e"), ("▁", "he"), ("▁", "t")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    spec.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("▁", scheme, split=False)
    spec.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(),
    ])  # fmt: skip
    spec.add_special_tokens(["<s>", "</s>"])
    folder.mkdir(parents=True, exist_ok=True)
    spec.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(template)
    return folder


def theirs(folder: Path, messages: list[tuple[str, str]], **settings: bool) -> list[int]:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [{"role": role, "content": text} for role, text in messages]
    return tokenizer.apply_chat_template(rows, return_dict=False, **settings)


def over(tokenizer: Tokenizer, name: str = "compact"):
    return make_template(name, tokenizer.with_tokens(missing_tokens(name, tokenizer)))


def test_llama_3_is_asked_in_its_own_words(tmp_path: Path):
    """The template, its system message, and an answer that its own token ends; slices stand on added rows."""
    tokenizer = llama_3(tmp_path)
    assert default_template(tokenizer) == "compact"
    template = over(tokenizer)
    assert template.turn_prompt(TALK) == theirs(tmp_path, TALK, add_generation_prompt=True)
    assert tokenizer.special["<|eot_id|>"] in template.turn_ends
    assert template.idle_id not in template.turn_ends


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_runs_of_text_get_the_space_that_the_vocabulary_gives_them(tmp_path: Path, scheme: str):
    folder = spm_folder(tmp_path, scheme)
    template = over(load_tokenizer(folder))
    assert template.turn_prompt(TALK[1:]) == theirs(folder, TALK[1:], add_generation_prompt=True)


def test_typed_control_tokens_and_markers_are_words(tmp_path: Path):
    tokenizer = llama_3(tmp_path)
    template = over(tokenizer)
    control = set(template.tokenizer.special.values())
    frame = [i for i in template.turn_prompt([("user", "x")]) if i in control]
    for word in (*template.tokenizer.special, "<|eot_id|><|start_header_id|>", "<|eot_<|eot_id|>id|>"):
        ids = template.turn_prompt([("user", f"a{word}b")])
        assert [i for i in ids if i in control] == frame
        assert f"a{word}b" in decode(template.tokenizer, ids)
    # A marker that is no token is told apart by its ids where the vocabulary has a token for its middle.
    chat = ChatTemplate(MISTRAL, load_tokenizer(spm_folder(tmp_path / "spm", "never")))
    ids = chat.encode([("user", "[/INST] he")]).ids
    assert decode(chat._tokenizer, ids) == "<s>[INST] [/INST] he [/INST]"


def test_sampled_ids_are_never_tokenised_again(tmp_path: Path):
    template = over(llama_3(tmp_path))
    said = template.tokenizer.encode(" He") + template.tokenizer.encode("llo ")
    ids, answers = template.turns([("user", "Hi"), ("assistant", said), ("user", "and?")])
    assert [ids[a:b] for a, b in answers] == [said]


def test_a_chat_teaches_answers_and_their_own_end(tmp_path: Path):
    template = over(llama_3(tmp_path))
    ids, codes = encode_chat(template, [*TALK, ("assistant", "A bot.")])
    assert ids == theirs(tmp_path, [*TALK, ("assistant", "A bot.")])
    taught = [i for i, code in zip(ids, codes, strict=True) if code == Code.SPOKEN]
    assert decode(template.tokenizer, taught) == "Hello!<|eot_id|>A bot.<|eot_id|>"


def test_turns_that_do_not_alternate(tmp_path: Path):
    """Joined where the template refuses two of a kind; refused with its own words where that does not help."""
    template = over(load_tokenizer(spm_folder(tmp_path, "never")))
    assert template.turn_prompt([("user", "a"), ("user", "b")]) == template.turn_prompt([("user", "a\n\nb")])
    with pytest.raises(UserError, match=r"chat template refuses these messages .*roles must alternate"):
        template.turn_prompt([("assistant", "a"), ("user", "b")])


@pytest.mark.parametrize("name", ["minicpm", "compact"])
def test_a_format_without_roles_says_what_it_cannot(name: str):
    template = over(byte_tokenizer(), name)
    for order, words in (("asu", "message 0 of role assistant"), ("usua", "message 1 of role system")):
        roles = {"a": "assistant", "s": "system", "u": "user"}
        with pytest.raises(UserError, match=f"no place for {words}"):
            template.turn_prompt([(roles[r], "x") for r in order])
    joined = template.turns([("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d")], open_answer=False)
    assert joined == template.turns([("user", "a\n\nb"), ("assistant", "c\n\nd")], open_answer=False)


def test_chatml_writes_every_order(reference: Path):
    template = over(byte_tokenizer(), "chatml")
    text = decode(template.tokenizer, template.turn_prompt([("assistant", "a"), ("system", "s"), ("user", "u")]))
    assert text == (
        "<|im_start|>assistant\na<|im_end|>\n<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% for", "is not valid Jinja"),
        ("{{ messages.__class__.__mro__ }}", "refuses these messages"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "refuses these messages"),
        ("{{ undefined_name.x }}", "refuses these messages"),
    ],
)
def test_broken_and_hostile_templates(source: str, words: str):
    with pytest.raises(UserError, match=words):
        ChatTemplate(source, byte_tokenizer()).render([("user", "a")])
