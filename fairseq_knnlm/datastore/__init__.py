"""The datastore on disk: one key and one value for each token of a text.

A datastore is a folder that describes itself (``docs/format.md``):

* ``manifest.json``: rows, width, types, and what made it;
* ``keys.npy``: (rows, width) float16 or float32, the language model's representation of a context,
  unless the keys went into the index only;
* ``values.npy``: (rows,) integers, the token that followed;
* ``projection.npy``, ``weights.npy``: only in a datastore made of a larger one (``compress``);
* ``documents.npz``: where the documents of the text begin.

Row i belongs to the i-th token of the split, in the order of the text, so row i + 1 follows row i,
unless entries were merged. The folder is written under a temporary name and renamed whole,
manifest last.
"""

from fairseq_knnlm.datastore.blocks import Block
from fairseq_knnlm.datastore.documents import (
    Documents,
    around,
    first_line,
    read_documents,
    write_documents,
)
from fairseq_knnlm.datastore.manifest import (
    BLOCKS,
    DOCUMENTS,
    FORMAT,
    INDEX,
    KEYS,
    MANIFEST,
    PROCESSOR,
    PROJECTION,
    VALUES,
    VERSION,
    WEIGHTS,
    Compression,
    Manifest,
    Origin,
    Stretch,
    Sums,
    read_manifest,
    value_dtype,
)
from fairseq_knnlm.datastore.reader import (
    Datastore,
    check_finite,
    check_numbers,
    key_files,
    open_array,
    open_datastore,
    outline,
    outlined,
)
from fairseq_knnlm.datastore.stacked import Rows, Stacked
from fairseq_knnlm.datastore.writer import (
    DatastoreWriter,
    check_new,
    check_room,
    datastore_bytes,
)

__all__ = [
    "BLOCKS",
    "DOCUMENTS",
    "FORMAT",
    "INDEX",
    "KEYS",
    "MANIFEST",
    "PROCESSOR",
    "PROJECTION",
    "VALUES",
    "VERSION",
    "WEIGHTS",
    "Block",
    "Compression",
    "Datastore",
    "DatastoreWriter",
    "Documents",
    "Manifest",
    "Origin",
    "Rows",
    "Stacked",
    "Stretch",
    "Sums",
    "around",
    "check_finite",
    "check_new",
    "check_numbers",
    "check_room",
    "datastore_bytes",
    "first_line",
    "key_files",
    "open_array",
    "open_datastore",
    "outline",
    "outlined",
    "read_documents",
    "read_manifest",
    "value_dtype",
    "write_documents",
]
