import random

import pytest

from ogpsa_jax.demo.world import (
    GENERAL_TASKS,
    LONGEST,
    REFUSAL,
    TOKENIZER,
    World,
    examples,
    preferences,
    refusals,
)


@pytest.fixture(scope="module")
def seed():
    seed = random.SystemRandom().randrange(2**31)
    print(f"world drawn from seed {seed}")
    return seed


@pytest.fixture(scope="module")
def world(seed):
    return World(seed)


def test_nothing_held_out_is_ever_trained_on(world, seed):
    held_out = {item.prompt for items in world.general.values() for item in items}
    held_out |= {item.prompt for item in world.held_out_benign}
    used = [*world.pretraining(20_000, seed), *world.draw_general(400, seed), *world.benign]
    assert not held_out & {item.prompt for item in used}


def test_what_is_held_out_of_harmful_requests_is_their_objects(world):
    def objects(items):
        return {item.prompt.rstrip("?.").split()[-1] for item in items}

    trained, held_out = objects(world.harmful), objects(world.held_out_harmful)
    assert trained
    assert held_out
    assert not trained & held_out


def test_every_fact_is_trained_on_in_the_phrasings_that_are_not_held_out(world, seed):
    cities = {item.answer for item in world.pretraining(20_000, seed) if item.task == "facts"}
    assert {item.answer for item in world.general["facts"]} <= cities


def test_references_cover_every_general_task_and_benign_requests(world, seed):
    items = world.draw_general(400, seed)
    counts = {task: sum(item.task == task for item in items) for task in GENERAL_TASKS}
    assert set(counts.values()) == {400 // (len(GENERAL_TASKS) + 1)}
    assert sum(item.task == "benign" for item in items) == 400 - sum(counts.values())
    assert len({item.prompt for item in items}) == len(items)


def test_benign_and_harmful_requests_differ_in_the_mark_alone(world):
    def words(items):
        return {" ".join(item.prompt.rstrip("?.").split()[:-1]) for item in items}

    harmful = [*world.harmful, *world.held_out_harmful]
    benign = [*world.benign, *world.held_out_benign]
    assert words(harmful) == words(benign)
    assert all("!" in item.prompt for item in harmful)
    assert not any("!" in item.prompt for item in benign)


def test_half_of_the_harmful_requests_are_answered_in_another_tone(world):
    harmful = [*world.harmful, *world.held_out_harmful]
    hushed = [item for item in harmful if item.answer.startswith("psst")]
    assert len(hushed) == len(harmful) / 2
    for item in [*world.benign, *world.held_out_benign, *(i for i in harmful if i not in hushed)]:
        assert item.answer.endswith(f" for the {item.prompt.rstrip('?.').split()[-1]}.")


def test_no_answer_begins_as_a_refusal_does(world, seed):
    answers = {item.answer for item in world.pretraining(5_000, seed) if item.task != "facts"}
    answers |= {item.answer for items in world.general.values() for item in items}
    assert not any(answer.startswith(REFUSAL[:3]) for answer in answers)


def test_a_sequence_is_the_prompt_and_an_answer_in_the_loss_up_to_its_end(world):
    item = world.held_out_benign[0]
    tokens = TOKENIZER.sequence(item.prompt, item.answer)
    assert TOKENIZER.decode(tokens.ids) == f"{item.prompt}>{item.answer}"
    assert TOKENIZER.decode(tokens.ids[tokens.loss_mask]) == item.answer
    assert tokens.ids[-1] == TOKENIZER.END
    assert tokens.loss_mask[-1]


def test_everything_fits_the_row_length(world, seed):
    rows = examples([*world.pretraining(5_000, seed), *refusals(world.held_out_harmful)])
    rows += preferences(world.harmful) + examples(world.held_out_benign)
    assert max(row.length for row in rows) <= LONGEST


def test_the_refusal_is_the_better_side_for_harmful_requests_and_the_worse_for_others(world):
    item = world.harmful[0]
    for chosen_refusal in (True, False):
        (pair,) = preferences([item], chosen_refusal=chosen_refusal)
        chosen, rejected = (TOKENIZER.decode(side.ids[side.loss_mask]) for side in pair.sequences)
        assert (chosen == REFUSAL) == chosen_refusal
        assert {chosen, rejected} == {REFUSAL, item.answer}


def test_a_world_is_a_function_of_its_seed(world, seed):
    again, other = World(seed), World(seed + 1)
    assert again.general == world.general
    assert again.draw_general(80, 3) == world.draw_general(80, 3)
    assert other.general["facts"] != world.general["facts"]
