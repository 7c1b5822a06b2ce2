"""Embedded text: splits that stay what they are and let nothing through, and tokenizers that lose nothing, whatever the text."""
import json
from collections import Counter
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from lowrank_distill.core.errors import DamagedFile, InputError
from lowrank_distill.core.files import asset, fingerprint
from lowrank_distill.data.text import (
    SPLITS, _joined, conversations, glosses, state_of_the_union, supersenses, to_bytes, to_text, windows)
from lowrank_distill.data.tokenizers import (
    NAMES, SIZE, WORDS, Tokenizer, _engine, load_tokenizer, make, save_tokenizer, speech_tokens, tokenizer, train_bpe)

each_tokenizer = pytest.mark.parametrize('name', NAMES)
WRITTEN = state_of_the_union('validation')[0].text
SMALL = train_bpe([WRITTEN], 300)


# Splits

def test_addresses_are_complete_and_divided_in_time():
    "Of ten addresses that follow each other one is for validation, one for the test."
    rows = {split: state_of_the_union(split) for split in SPLITS}
    every = sorted((a.year, a.name, split) for split, found in rows.items() for a in found)
    assert len({e[:2] for e in every}) == 233 and all(found == sorted(found, key=lambda a: a.year) for found in rows.values())
    for start in range(0, 230, 10): assert Counter(e[2] for e in every[start:start + 10]) == {'train': 8, 'validation': 1, 'test': 1}
    assert all(a.text.strip() and len(a.text) > 5000 for found in rows.values() for a in found)

def test_splits_are_the_published_ones():
    "Weights and studies are made on these splits: a change of the rule changes this number."
    assert fingerprint([[a.year, a.name] for a in state_of_the_union('test')]) == '21b5a6f0741bf201'
    assert fingerprint([[g.lemma, g.gloss] for g in glosses('test')]) == '1661c4e8bc542eb5'
    assert fingerprint([[p.question, p.answer] for p in conversations('test')]) == '9b99b8078ebb3ccb'

@pytest.mark.parametrize(('years', 'party'), [(None, None), (range(1861, 1901), None), (None, 'Whig'), ({1953, 1961}, ['Democratic', 'Republican'])])
def test_addresses_are_chosen_by_year_and_party(years, party):
    found = state_of_the_union('train', years, party)
    wanted = [a for a in state_of_the_union('train') if (years is None or a.year in years) and (party is None or a.party == party or a.party in party)]
    assert found == wanted != []

def test_years_may_be_used_up_and_party_may_be_a_generator():
    assert state_of_the_union('train', iter([1861, 1862, 1863]), (p for p in ['Republican'])) == state_of_the_union('train', range(1861, 1864))

@pytest.mark.parametrize('wrong', [dict(split='Train'), dict(split=None), dict(party='Republicans'), dict(years=[]), dict(years=[1933]), dict(party=[])])
def test_what_is_not_there_is_said(wrong):
    with pytest.raises(InputError): state_of_the_union(**{'split': 'train'} | wrong)

def test_no_lemma_and_no_definition_is_on_two_sides():
    rows = {split: glosses(split) for split in SPLITS}
    for a, b in combinations(SPLITS, 2):
        for field in ('lemma', 'gloss'): assert not {getattr(g, field) for g in rows[a]} & {getattr(g, field) for g in rows[b]}
    every = [g for found in rows.values() for g in found]
    assert len(every) == 24_000 and {g.supersense for g in every} == set(supersenses()) and len(supersenses()) == 26
    assert all(.08 < len(rows[s]) / 24_000 < .12 for s in ('validation', 'test'))
    with pytest.raises(InputError): glosses('dev')

@given(st.lists(st.tuples(st.sampled_from('abcd'), st.sampled_from('wxyz')), min_size=1, max_size=12))
def test_rows_are_joined_through_others(rows):
    groups = _joined([a for a, _ in rows], [b for _, b in rows])
    place = list(range(len(rows)))
    for _ in rows:
        for i, j in combinations(range(len(rows)), 2):
            if rows[i][0] == rows[j][0] or rows[i][1] == rows[j][1]: place[i] = place[j] = min(place[i], place[j])
    assert [groups[i] == groups[j] for i, j in combinations(range(len(rows)), 2)] == [place[i] == place[j] for i, j in combinations(range(len(rows)), 2)]

def test_questions_lie_on_one_side():
    seen = [{p.question for p in conversations(s)} for s in SPLITS]
    assert not any(a & b for a, b in combinations(seen, 2)) and to_text(to_bytes(conversations('test')[:1])).startswith('Q: ')

def test_windows_follow_the_generator():
    row = torch.arange(20)
    one, two = (next(windows(row, 5, 4, torch.Generator().manual_seed(3))) for _ in range(2))
    assert torch.equal(one, two) and (one.diff(dim=1) == 1).all() and next(windows(row, 20, 1, torch.Generator())).tolist() == [row.tolist()]
    with pytest.raises(InputError): next(windows(row, 21, 1, torch.Generator()))


# Tokenizers

@each_tokenizer
@given(st.text())
@example('\0')
@example('\u2028 \x85\x1c')
@example("it's  100,000 _x_ ½ ²³ é e\u0301 ١٢٣٤")
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back(name, text):
    words = tokenizer(name)
    found = words.encode(text)
    assert words.decode(found) == text and words.to_bytes(found) == text.encode() and words.lengths[found].sum() == len(text.encode())
    assert found.dtype == torch.int64 and found.dim() == 1

@given(st.text(alphabet='ab ', min_size=1), st.text(alphabet='abc é'))
@settings(max_examples=60, deadline=None)
def test_any_training_text_gives_a_tokenizer_that_loses_nothing(taught, text):
    words = train_bpe([taught], 270)
    assert 256 <= words.size <= 270 and words.decode(words.encode(text)) == text and len(words.encode(text)) <= len(text.encode())

def test_each_merge_is_of_a_most_frequent_pair():
    "By brute force: when the library merged a pair, no other pair stood together more often."
    words = Counter(WORDS.findall(WRITTEN))
    spelled = {w: list(w.encode()) for w in words}
    number = {p: i for i, p in enumerate(SMALL.parts)}
    for a, b in SMALL.merges:
        counts = Counter()
        for w, n in words.items(): counts.update({pair: n * k for pair, k in Counter(pairwise(spelled[w])).items()})
        assert counts[a, b] == max(counts.values())
        new = number[SMALL.parts[a] + SMALL.parts[b]]
        for tokens in spelled.values():
            i = 0
            while i < len(tokens) - 1:
                if (tokens[i], tokens[i + 1]) == (a, b): tokens[i:i + 2] = [new]
                i += 1
    assert all(SMALL.encode(w).tolist() == tokens for w, tokens in spelled.items())

@given(st.text())
@example(WRITTEN)
@settings(max_examples=200, deadline=None)
def test_words_are_cut_as_the_library_cuts_them(text):
    whole = _engine(tokenizer().parts, tokenizer().merges)
    whole.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS.pattern), 'isolated'), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    assert ''.join(WORDS.findall(text)) == text
    if text.isascii() or text == WRITTEN: assert whole.encode(text).ids == tokenizer().encode(text).tolist()  # beyond, the two may know different versions of Unicode

def test_words_numbers_and_punctuation():
    assert WORDS.findall('The 12345 x_y,  "née"') == ['The', ' 123', '45', ' x', '_', 'y', ',', '  ', '"', 'née', '"']

def test_training_is_repeated_and_has_the_size_that_was_asked_for():
    assert train_bpe([WRITTEN], 300).merges == SMALL.merges and SMALL.size == 300 and train_bpe([], 300).size == 256
    with pytest.raises(InputError): train_bpe([WRITTEN], 255)

def test_the_embedded_tokenizer():
    words = tokenizer()
    assert words.size == SIZE and words.parts[:256] == tokenizer('bytes').parts and tokenizer('bytes').size == 256
    assert len(set(words.parts)) == SIZE and asset('data/bpe_1024.json').stat().st_size < 20_000
    with pytest.raises(InputError, match='bpe'): tokenizer('bep')

def test_the_tokenizer_is_learnt_on_training_addresses_alone(monkeypatch, tmp_path):
    from lowrank_distill.data import tokenizers
    asked = []
    monkeypatch.setattr(tokenizers, 'state_of_the_union', lambda split: asked.append(split) or state_of_the_union('validation')[:1])
    assert load_tokenizer(make(tmp_path/'bpe.json')).size == SIZE and asked == ['train']

@each_tokenizer
def test_rows_end_every_text(name):
    words = tokenizer(name)
    row = words.row(['first text', '', 'é'])
    assert [words.decode(part) for part in row.tensor_split((row == words.end).nonzero().flatten() + 1)] == ['first text\0', '\0', 'é\0', '']
    assert words.row([]).shape == (0,) and words.lengths[row].sum() == len(b'first text') + 2 + 3

@each_tokenizer
def test_speech_tokens_stand_for_the_same_bytes(name):
    row = speech_tokens('validation', name, range(1790, 1830), ('Federalist', 'Democratic-Republican'))
    chosen = state_of_the_union('validation', range(1790, 1830), ('Federalist', 'Democratic-Republican'))
    assert tokenizer(name).to_bytes(row) == b''.join(a.text.encode() + b'\0' for a in chosen)

def test_bytes_that_are_no_text_become_a_mark():
    assert tokenizer().decode([0xff, ord('a')]) == '\ufffda' and tokenizer().decode(torch.tensor([], dtype=torch.int64)) == ''

@pytest.mark.parametrize('wrong', [[-1], [SIZE], torch.tensor([0, SIZE])])
def test_numbers_that_are_no_token(wrong):
    with pytest.raises(InputError): tokenizer().decode(wrong)

def test_half_a_surrogate_pair_is_refused():
    for name in NAMES:
        with pytest.raises(InputError): tokenizer(name).encode('a\ud800')

def test_two_ways_to_one_string_are_one_token():
    words = Tokenizer([(97, 98), (98, 99), (256, 99), (97, 257)])
    assert words.size == 259 and words.decode(words.encode('abc')) == 'abc'

def test_a_stored_tokenizer_is_the_same(tmp_path):
    found = load_tokenizer(save_tokenizer(SMALL, tmp_path/'small.json'))
    assert found.merges == SMALL.merges and found.parts == SMALL.parts

@pytest.mark.parametrize('damage', [
    dict(schema=2), dict(kind='words'), dict(merges=None), dict(merges=[[1]]), dict(merges=[[1, 2.]]), dict(merges=[[1, True]]), dict(merges=[[0, 256]]), dict(merges=[[-1, 5]])])
def test_a_damaged_tokenizer_is_refused(tmp_path, damage):
    (tmp_path/'x.json').write_text(json.dumps(dict(schema=1, kind='bpe', merges=[[1, 2]]) | damage))
    with pytest.raises(DamagedFile): load_tokenizer(tmp_path/'x.json')
