import logging
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frugalpath.errors import InputError
from frugalpath.rewards.entities import (
    MAX_CHARS,
    MAX_TOKENS,
    Vocabulary,
    entity_f1,
    entity_f1_score,
    find_entities,
    read_vocabulary,
)
from frugalpath.rewards.registry import get_reward, gold_completion, warn_unscorable

TERMS = """
# one concept a line
adenocarcinoma
carcinoma | malignancy | malignant tumor
invasive carcinoma
invasive carcinoma of no special type | ductal carcinoma, NST
lymphovascular invasion | lymphatic or vascular invasion | LVI
perineural invasion

necrosis
dysplasia
high-grade dysplasia
metastasis
margin
lymph node
estrogen receptor | ER
progesterone receptor | PR
HER2
Helicobacter pylori | H. pylori
intestinal metaplasia
Barrett esophagus
chronic gastritis
granuloma
non-small cell carcinoma
"""
GOLD = "Adenocarcinoma with necrosis. Lymphovascular invasion not identified. Margins negative for carcinoma."


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "terms.txt"
    path.write_text(TERMS)
    return str(path)


@pytest.fixture(scope="module")
def vocabulary(file):
    return read_vocabulary(file)


def found(text, vocabulary):
    """Concepts with + or - before them, +- for both."""
    signs = {True: "+", False: "-", None: "+-"}
    return {signs[present] + concept for concept, present in find_entities(text, vocabulary).items()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ADENOCARCINOMAS", {"+adenocarcinoma"}),
        ("Malignant tumours", {"+carcinoma"}),
        ("metastases", {"+metastasis"}),
        ("Barrett's oesophagus", {"+Barrett esophagus"}),
        ("high grade dysplasia", {"+high-grade dysplasia"}),
        ("low- and high-grade dysplasia", {"+high-grade dysplasia"}),
        ("margin(s) free", {"+margin"}),
        ("Invasive\u2010carcinoma", {"+invasive carcinoma"}),
        ("Helicobacter\n pylori", set()),  # a line is a sentence
        ("H. pylori gastritis. Granuloma.", {"+Helicobacter pylori", "+granuloma"}),
        ("invasive carcinoma", {"+invasive carcinoma"}),  # the longest term, not carcinoma as well
        ("Invasive carcinoma of no special type", {"+invasive carcinoma of no special type"}),
        ("ductal carcinoma, NST; ductal carcinoma NST", {"+invasive carcinoma of no special type"}),
        ("non-small-cell carcinoma", {"+non-small cell carcinoma"}),
        ("adenocarcinomatous, precarcinoma, ER, other", {"+estrogen receptor"}),  # whole words
    ],
)
def test_terms(text, expected, vocabulary):
    assert found(text, vocabulary) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No necrosis.", {"-necrosis"}),
        ("without necrosis or dysplasia", {"-necrosis", "-dysplasia"}),
        ("no dysplasia, granulomas, or malignancy", {"-dysplasia", "-granuloma", "-carcinoma"}),
        ("no malignancy, chronic gastritis", {"-carcinoma", "+chronic gastritis"}),
        ("no evidence of malignancy but chronic gastritis", {"-carcinoma", "+chronic gastritis"}),
        ("Chronic gastritis, negative for H. pylori", {"+chronic gastritis", "-Helicobacter pylori"}),
        ("Negative for: necrosis or granuloma", {"-necrosis", "-granuloma"}),
        ("Neither necrosis nor granulomas are seen", {"-necrosis", "-granuloma"}),
        ("necrosis is absent", {"-necrosis"}),
        ("Necrosis: absent", {"-necrosis"}),
        ("Necrosis: none", {"-necrosis"}),
        ("Necrosis: No", {"-necrosis"}),
        ("Perineural invasion:\n  Not identified", {"-perineural invasion"}),
        ("Perineural and lymphovascular invasion are not identified", {"-lymphovascular invasion"}),
        ("Adenocarcinoma, LVI not identified", {"+adenocarcinoma", "-lymphovascular invasion"}),
        ("Adenocarcinoma with LVI not identified", {"+adenocarcinoma", "-lymphovascular invasion"}),
        ("Lymph nodes: carcinoma absent", {"+lymph node", "-carcinoma"}),
        ("Margins negative for carcinoma", {"+margin", "-carcinoma"}),
        ("adenocarcinoma, negative margins", {"+adenocarcinoma", "-margin"}),
        ("negative margins and necrosis", {"-margin", "+necrosis"}),
        ("no lymphatic or vascular invasion", {"-lymphovascular invasion"}),
        ("the tumor does not show necrosis", {"-necrosis"}),
        ("non-invasive carcinoma with necrosis", {"-invasive carcinoma", "+necrosis"}),
        ("ER negative, PR positive", {"-estrogen receptor", "+progesterone receptor"}),
        ("ER-, PR+, HER2 (-)", {"-estrogen receptor", "+progesterone receptor", "-HER2"}),
        ("ER (negative) PR (positive)", {"-estrogen receptor", "+progesterone receptor"}),
        ("not only necrosis but dysplasia", {"+necrosis", "+dysplasia"}),
        ("malignancy cannot be excluded", {"+carcinoma"}),
        ("malignancy is excluded", {"-carcinoma"}),
        ("no change in necrosis", {"+necrosis"}),
        ("No. Necrosis.", {"+necrosis"}),
        ("one node with metastasis, one without metastasis", {"+-metastasis"}),
        ("no necrosis. necrosis. no necrosis", {"+-necrosis"}),
    ],
)
def test_polarity(text, expected, vocabulary):
    assert found(text, vocabulary) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (GOLD, 1.0),
        ("MARGINS: no malignancy; necrotic; LVI absent; adenocarcinomas; necroses", 1.0),
        ("Adenocarcinoma", 2 * 1 / (1 + 5)),
        ("Adenocarcinoma with necrosis and lymphovascular invasion", 2 * 2 / (3 + 5)),
        ("Adenocarcinoma and granuloma", 2 * 1 / (2 + 5)),
        ("Adenocarcinoma. No adenocarcinoma. Necrosis.", 2 * 1 / (2 + 5)),
        ("Tissue", 0.0),
    ],
)
def test_f1_by_hand(answer, expected, vocabulary):
    assert find_entities(GOLD, vocabulary) == {
        "adenocarcinoma": True, "necrosis": True, "lymphovascular invasion": False, "margin": True, "carcinoma": False
    }  # fmt: skip
    assert entity_f1_score(answer, GOLD, vocabulary) == pytest.approx(expected)


def test_what_the_gold_affirms_and_denies_does_not_count(vocabulary):
    gold = "Node 1: metastasis. Node 2: no metastasis. Necrosis."
    for answer in (gold, "Necrosis", "Necrosis, metastasis", "Necrosis, no metastasis"):
        assert entity_f1_score(answer, gold, vocabulary) == 1.0
    assert entity_f1_score("Necrosis", "Metastasis. No metastasis.", vocabulary) is None


def test_naming_everything_earns_little(vocabulary):
    for every in (". ".join(vocabulary.concepts), ". no ".join(["", *vocabulary.concepts])):
        assert entity_f1_score(every, "Adenocarcinoma with necrosis", vocabulary) < 0.2


def test_as_a_reward(file, caplog):
    warn_unscorable.cache_clear()
    reward = get_reward({"name": "entity_f1", "params": {"vocabulary": file}})
    completions = [gold_completion({"answer": GOLD}), GOLD, f"<think>{GOLD}</think><answer>x</answer>", ""]
    assert reward(completions, answer=[GOLD] * 4, task=["open"] * 4) == [1.0, 0.0, 0.0, 0.0]
    with caplog.at_level(logging.WARNING):
        values = reward(
            completions[:1] * 4,
            answer=[GOLD, "nothing that is known", None, GOLD],
            task=["choice", "open", "open", None],
            id=["1", "2", "3", "4"],
        )
    assert values == [None, None, None, 1.0]
    assert [f"row {i}" in caplog.text for i in range(1, 5)] == [False, True, True, False]


def test_the_protocols_are_the_default_vocabulary():
    reward = get_reward("entity_f1")
    gold = "Stomach, endoscopic biopsy; Chronic active gastritis without intestinal metaplasia."
    answers = [gold, "Stomach: intestinal metaplasia without chronic active gastritis", "a piece of tissue"]
    same, swapped, nothing = reward([gold_completion({"answer": a}) for a in answers], answer=[gold] * 3)
    assert same == 1.0 and nothing == 0.0 and 0.0 < swapped < 0.5
    concepts = read_vocabulary().concepts
    assert len(concepts) > 300 and not {"present", "positive"} & set(concepts)
    assert reward([gold_completion({"answer": ". ".join(concepts)[:MAX_CHARS]})], answer=[gold])[0] < 0.05


def test_a_receptor_that_is_flipped_is_another_finding():
    def f1(answer, gold):
        return entity_f1([f"<answer>{answer}</answer>"], answer=[gold])[0]

    assert f1("ER negative, PR positive", "ER positive, PR negative") == 0
    assert f1("No lymphovascular invasion", "Lymphovascular invasion not identified") == 1


def test_bad_vocabularies_are_named(tmp_path):
    path = tmp_path / "terms.txt"
    path.write_text("tumor | mass\n\n# note\nnodule | Tumours\n--- | lump\n")
    with pytest.raises(InputError) as error:
        read_vocabulary(str(path))
    assert error.value.problems == [
        f"{path}, lines 1 and 4: 'Tumours' stands for two concepts; keep one",
        f"{path}, line 5: '---' has no letter or digit; remove it",
    ]
    path = tmp_path / "empty.txt"
    path.write_text("# nothing\n")
    with pytest.raises(InputError, match="has no term"):
        read_vocabulary(str(path))
    with pytest.raises(InputError, match="cannot be read"):
        get_reward({"name": "entity_f1", "params": {"vocabulary": str(tmp_path / "none.txt")}})([""], answer=["a"])


WORDS = re.findall(
    r"[^ ]+",
    "no not identified absent negative for necrosis dysplasia er granulomas or and but with , . : ( ) - (-) \n ; non "
    "h. pylori lymph node",
)


@given(st.text() | st.lists(st.sampled_from(WORDS)).map(" ".join), st.lists(st.sampled_from(WORDS)).map(" ".join))
def test_any_text_scores_0_to_1_and_itself_1(candidate, reference):
    vocabulary = Vocabulary.of((t, t) for t in ("necrosis", "dysplasia", "ER", "granuloma", "H. pylori", "lymph node"))
    wanted = find_entities(reference, vocabulary)
    value = entity_f1_score(candidate, reference, vocabulary)
    if {True, False} & set(wanted.values()):
        assert value is not None and 0.0 <= value <= 1.0
        assert entity_f1_score(reference, reference, vocabulary) == 1.0
        assert entity_f1_score("", reference, vocabulary) == 0.0
    else:
        assert value is None
    assert find_entities(reference.upper().replace(" ", "  "), vocabulary) == wanted


FLOODS = {
    "no": "no " * (MAX_TOKENS - 10),
    "no a": "no a " * (MAX_CHARS // 5),
    "minus": "er- " * (MAX_TOKENS // 2),
    "absent": "necrosis absent " * (MAX_CHARS // 16),
    "or": "no or " * (MAX_TOKENS // 2 - 5),
    "prefixes": "lymphatic or vascular " * (MAX_CHARS // 22),
    "lines": "\n" * MAX_CHARS,
    "headings": ":\n" * (MAX_CHARS // 2),
    "unfolding": "\ufdfa" * 2_000,
    "foreign": "\ufdfa" * MAX_CHARS,
    "combining": "e" + "\u0301" * 1_999,
    "one word": "a" * MAX_CHARS,
    "1 MB": "necrosis " * 110_000,
}


@pytest.mark.parametrize("text", FLOODS.values(), ids=FLOODS.keys())
def test_no_text_is_slow(text, vocabulary):
    seconds = 1.0
    for _ in range(5):  # the best of a few, since the machine may be busy
        started = time.process_time()
        entity_f1_score(text, GOLD, vocabulary)
        seconds = min(seconds, time.process_time() - started)
        if seconds < 0.05:
            break
    assert seconds < 0.05
    if len(text) > MAX_CHARS or text == FLOODS["foreign"]:
        assert find_entities(text, vocabulary) == {}
