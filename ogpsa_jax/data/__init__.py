"""Records and their validation, chat templates and loss masks, packing, the input pipeline.

The way of a row: ``located_rows`` reads it from its file, ``read_records`` checks it and makes a
record of it by the reader of its format, ``ChatTemplate.encode_all`` tokenises the record,
``outcomes_of`` cuts it into examples, and ``TrainBatches.batch`` puts these into arrays.
"""

from ogpsa_jax.data.batches import TrainBatches, fixed_batches
from ogpsa_jax.data.built_in import BUILT_IN
from ogpsa_jax.data.dates import DEFAULT_DATE
from ogpsa_jax.data.examples import DataReport, Example, Predictions, Tokens, digest
from ogpsa_jax.data.preparation import Answers, prepare
from ogpsa_jax.data.reading import read_records, split_by_prompt
from ogpsa_jax.data.records import DataSource, Message, Record
from ogpsa_jax.data.templates import ChatTemplate
from ogpsa_jax.data.tokenizer import load_tokenizer

__all__ = [
    "BUILT_IN",
    "DEFAULT_DATE",
    "Answers",
    "ChatTemplate",
    "DataReport",
    "DataSource",
    "Example",
    "Message",
    "Predictions",
    "Record",
    "Tokens",
    "TrainBatches",
    "digest",
    "fixed_batches",
    "load_tokenizer",
    "prepare",
    "read_records",
    "split_by_prompt",
]
