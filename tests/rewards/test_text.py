"""The text measures against the libraries that define them, by hand, and against what a policy may write."""

import logging
import random
import re
import sys
import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from nltk.translate.meteor_score import single_meteor_score

from frugalpath.errors import InputError
from frugalpath.rewards import text as module
from frugalpath.rewards.registry import get_reward, warn_unscorable
from frugalpath.rewards.text import MAX_CHARS, MAX_WITH_SYNONYMS, MAX_WORDS, bleu4_score, meteor_score, rouge_l_score

SCORES = {"bleu4": bleu4_score, "rouge_l": rouge_l_score, "meteor": meteor_score}
every = pytest.mark.parametrize("name", SCORES)

VOCABULARY = re.findall(
    r"\S+",
    """
    adenocarcinoma moderately differentiated invasive ductal carcinoma lobular tumor tumours cells show shows showing
    nuclear pleomorphism mitotic figures mitoses per high-power field lymphovascular invasion is are not identified
    present absent negative positive for the of and with in a no evidence malignancy, margins, glands gland chronic
    gastritis Helicobacter pylori intestinal metaplasia dysplasia HER2 (3+) Ki-67 20% 2.5 cm stage pT2 N0. stroma,
    fibrosis; necrosis: focal focally infiltrating infiltrate lymphocytic inflammation inflamed metastatic metastasis
    metastases node nodes biopsy biopsies: grade 2, 3/8 keratinising squamous epithelium epithelial
    """,
)
NO_WORDNET = SimpleNamespace(synsets=lambda word: ())


def pairs(count, seed):
    """Sentences and what a few edits made of them, or another sentence; no two of the same words."""
    rng = random.Random(seed)
    while count:
        reference = rng.choices(VOCABULARY, k=rng.randint(1, 40))
        candidate = list(reference) if rng.random() < 0.9 else rng.choices(VOCABULARY, k=rng.randint(1, 40))
        for _ in range(rng.randint(0, 12)):
            at = rng.randrange(len(candidate) + 1)
            edit = rng.randrange(5)
            if edit == 0:
                candidate.insert(at, rng.choice(VOCABULARY))
            elif edit == 1 and at < len(candidate) > 1:
                del candidate[at]
            elif edit == 2:
                candidate[at:] = candidate[at:][::-1]
            elif edit == 3 and at < len(candidate):
                candidate[at] = candidate[at].upper()
            elif at < len(candidate):
                candidate[at] = rng.choice(VOCABULARY)
        candidate, reference = " ".join(candidate), " ".join(reference)
        if candidate.lower().replace(",", "") != reference.lower().replace(",", ""):
            count -= 1
            yield candidate, reference


def test_bleu4_is_nltks():
    for candidate, reference in pairs(1000, seed=1):
        expected = sentence_bleu(
            [reference.split()], candidate.split(), smoothing_function=SmoothingFunction().method4
        )
        assert bleu4_score(candidate, reference) == pytest.approx(expected, abs=1e-12)


@pytest.mark.slow
def test_rouge_l_is_rouge_scores():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)
    values = set()
    for candidate, reference in pairs(1000, seed=2):
        expected = scorer.score(reference, candidate)["rougeL"].fmeasure
        assert rouge_l_score(candidate, reference) == pytest.approx(expected, abs=1e-12)
        values.add(expected)
    assert len(values) > 300


@given(st.lists(st.text("abegilnorstuyz019", min_size=1, max_size=9), min_size=1, max_size=5), st.text(max_size=30))
def test_rouge_l_has_the_words_of_rouge_score(words, text):
    tokenize = pytest.importorskip("rouge_score.tokenize")
    porter = pytest.importorskip("nltk.stem.porter").PorterStemmer()
    for written in (" ".join(words), text):
        assert module._rouge_words(written) == tokenize.tokenize(written, porter)


def test_meteor_is_nltks():
    from nltk.tokenize import wordpunct_tokenize

    for candidate, reference in pairs(1000, seed=3):
        expected = single_meteor_score(
            wordpunct_tokenize(reference), wordpunct_tokenize(candidate), wordnet=NO_WORDNET
        )
        assert meteor_score(candidate, reference) == pytest.approx(expected, abs=1e-12)


def test_values_by_hand():
    # 3/4, 2/3, 1/2 of the n-grams, and for none of the one 4-gram ln 4 / (2 * 5); lengths are equal
    assert bleu4_score("a b c x", "a b c d") == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 0.13862943611) ** 0.25)
    assert bleu4_score("a b c d", "a b c d e f g h") == pytest.approx(0.36787944117)  # all n-grams; brevity exp(1 - 2)
    assert bleu4_score("Benign", "benign") == 0.0  # with case
    # "glands" and "gland" meet; 2 of 3 and 2 of 4 words in order
    assert rouge_l_score("Glands, atypical!", "gland with atypical") == pytest.approx(2 * 2 / 5)
    assert rouge_l_score("atypical glands", "glands atypical") == pytest.approx(0.5)
    # P 1, R 1/2, F = P R / (0.9 P + 0.1 R) = 10/19; one chunk of two matches: penalty 0.5 / 8
    assert meteor_score("chronic gastritis", "chronic gastritis of antrum") == pytest.approx(10 / 19 * (1 - 0.5 / 8))
    # all four match, in four chunks
    assert meteor_score("d c b a", "a b c d") == pytest.approx(0.5)


@every
def test_the_words_of_the_gold_score_one(name):
    for gold in ("benign", "Chronic  gastritis.\n", "a b c d e f", "Ki-67: 20 %"):
        (value,) = get_reward(name)([f"<answer>\n {' '.join(gold.split())} </answer>"], answer=[gold], task=["open"])
        assert value == 1.0
        assert SCORES[name]("something else", gold) < 0.2


@every
def test_rows_of_other_tasks_and_unusable_rows_do_not_apply(name, caplog):
    warn_unscorable.cache_clear()
    answers = ["benign"] * 3 + [None, "", " ", "word " * (MAX_WORDS + 1), "a" * (MAX_CHARS + 1)]
    tasks = ["open", "choice", None] + ["open"] * 5
    with caplog.at_level(logging.WARNING):
        values = get_reward(name)(
            ["<answer>benign</answer>"] * 8, answer=answers, task=tasks, id=[f"row-{i}" for i in range(8)]
        )
    assert values == [1.0, None, 1.0] + [None] * 5
    assert [f"row-{i}" in caplog.text for i in range(8)] == [False] * 3 + [True] * 5


@every
def test_only_the_answer_counts(name):
    gold = "chronic gastritis with intestinal metaplasia"
    completions = [gold, f"<answer>{gold}", f"<answer>{gold}</answer><answer>{gold}</answer>", "",
                   f"<think>{gold}</think><answer>dysplasia</answer>"]  # fmt: skip
    assert get_reward(name)(completions, answer=[gold] * 5) == [0.0] * 5
    assert get_reward(name)([f"dysplasia <answer>{gold}</answer> dysplasia"], answer=[gold]) == [1.0]


@every
def test_an_answer_longer_than_any_report_scores_zero(name):
    gold = " ".join(f"w{i}" for i in range(MAX_WORDS))
    assert SCORES[name](gold + " x", gold) == 0.0
    assert SCORES[name](gold[:-1], gold) > 0.9
    assert SCORES[name]("a" * MAX_CHARS + " benign", "benign") == 0.0


@every
@given(st.text() | st.text(" .,abAB(é\n\u0301", max_size=40), st.text(" .,abAB(é\n", max_size=40))
def test_any_text_scores_0_to_1(name, candidate, reference):
    assert 0.0 <= SCORES[name](candidate, reference) <= 1.0
    assert SCORES[name](reference, reference) in (0.0, 1.0)
    assert SCORES[name]("", reference) == SCORES[name](candidate, "") == 0.0
    (value,) = get_reward(name)([f"<answer>{candidate}</answer>"], answer=["a b c"])
    assert 0.0 <= value <= 1.0


def syllables(count, rng):
    return "".join(rng.choice(["ation", "yy", "ing", "ses", "b", "ed", "ational", "o"]) for _ in range(count))


def floods():
    rng = random.Random(0)
    gold = " ".join(syllables(2, rng) for _ in range(MAX_WORDS))[:MAX_CHARS]
    yield " ".join(syllables(2, rng) for _ in range(MAX_WORDS))[:MAX_CHARS], gold  # different words
    yield " ".join(rng.choices(gold.split(), k=MAX_WORDS))[:MAX_CHARS], gold  # words of the gold in disorder
    yield "a b " * (MAX_WORDS // 2), "b a " * (MAX_WORDS // 2)
    yield "y" * MAX_CHARS, gold
    yield " ".join(["y" * 63 + str(i % 10) for i in range(MAX_CHARS // 65)]), gold
    yield "a,b;" * (MAX_WORDS // 4), "b,a." * (MAX_WORDS // 4)
    yield "a" * 1_000_000, gold
    yield "a " * 500_000, gold
    yield "\ufdfa " * 9_000, "a b c"
    yield "." * MAX_CHARS, ". ," * 600


@every
@pytest.mark.parametrize(("candidate", "reference"), list(floods()))
def test_no_text_is_slow(name, candidate, reference):
    SCORES[name]("a b", "a c")  # the library is imported once
    seconds = 1.0
    for _ in range(5):  # the best of a few, since the machine may be busy
        module._porter.cache_clear()
        started = time.perf_counter()
        SCORES[name](candidate, reference)
        seconds = min(seconds, time.perf_counter() - started)
        if seconds < 0.05:
            break
    assert seconds < 0.05


SYNSETS = {"tumor": ["tumor", "neoplasm"], "growth": ["growth", "growing", "development", "tumor_growth"]}


@pytest.fixture
def wordnet(monkeypatch):
    """A WordNet of two synsets, as NLTK's reader gives them."""

    def synsets(word):
        found = [s for s in SYNSETS.values() if word in s]
        return [SimpleNamespace(lemmas=lambda s=s: [SimpleNamespace(name=lambda n=n: n) for n in s]) for s in found]

    reader = SimpleNamespace(synsets=synsets, ensure_loaded=lambda: None)
    monkeypatch.setattr(sys.modules["nltk.corpus"], "wordnet", reader)
    for cached in (module._wordnet, module._lookup):
        cached.cache_clear()
    yield reader
    for cached in (module._wordnet, module._lookup):
        cached.cache_clear()


def test_synonyms(wordnet):
    candidate, reference = "the neoplasm shows growing", "the tumor shows development"
    assert meteor_score(candidate, reference) == pytest.approx(0.25)  # two of four, in two chunks
    value = meteor_score(candidate, reference, synonyms=True)
    assert value == pytest.approx(single_meteor_score(reference.split(), candidate.split(), wordnet=wordnet))
    assert value == pytest.approx(3 / 4 * (1 - 0.5 / 27))  # NLTK looks up the stem of `growing`, which is in no synset
    (same,) = get_reward({"name": "meteor", "params": {"synonyms": True}})(
        [f"<answer>{candidate}</answer>"], answer=[reference]
    )
    assert same == value
    long = "the " * MAX_WITH_SYNONYMS
    assert meteor_score(long + "tumor", reference, synonyms=True) == 0.0 < meteor_score(long + "tumor", reference)


@pytest.mark.parametrize("error", [LookupError("Resource wordnet not found"), OSError("No such file: lexnames")])
def test_synonyms_without_wordnet_name_the_remedy(wordnet, monkeypatch, error):
    def missing():
        raise error

    monkeypatch.setattr(wordnet, "ensure_loaded", missing)
    with pytest.raises(InputError, match=r"nltk\.downloader wordnet"):
        get_reward({"name": "meteor", "params": {"synonyms": True}})([""], answer=["a"], task=["choice"])
    assert get_reward("meteor")(["<answer>a</answer>"], answer=["a"]) == [1.0]
