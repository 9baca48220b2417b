"""Files that appear whole or not at all, and that tell when they were altered.

What the other folders use of this one; arrays that nobody vouches for are read by ``arrays``.
"""

from fairseq_knnlm.files.claims import Claim, partial_folder, partial_prefix, tidy
from fairseq_knnlm.files.folders import flush_to_disk, make_folders
from fairseq_knnlm.files.integrity import (
    Checking,
    Checks,
    Checksum,
    altered,
    checksums,
    chunk_count,
    chunks_of,
    sampled_chunks,
)
from fairseq_knnlm.files.mapped import check_mapped, reserve
from fairseq_knnlm.files.outputs import check_output, check_outputs
from fairseq_knnlm.files.plain_json import MOST_JSON, parse_json, typed, write_json
from fairseq_knnlm.files.publishing import publish
from fairseq_knnlm.files.sealed import (
    Fingerprint,
    fingerprint,
    read_sealed,
    seal,
    unseal,
    write_sealed,
)
from fairseq_knnlm.files.sizes import human_bytes

__all__ = [
    "MOST_JSON",
    "Checking",
    "Checks",
    "Checksum",
    "Claim",
    "Fingerprint",
    "altered",
    "check_mapped",
    "check_output",
    "check_outputs",
    "checksums",
    "chunk_count",
    "chunks_of",
    "fingerprint",
    "flush_to_disk",
    "human_bytes",
    "make_folders",
    "parse_json",
    "partial_folder",
    "partial_prefix",
    "publish",
    "read_sealed",
    "reserve",
    "sampled_chunks",
    "seal",
    "tidy",
    "typed",
    "unseal",
    "write_json",
    "write_sealed",
]
