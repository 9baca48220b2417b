"""``python -m fairseq_knnlm.cli``, the same as ``fairseq-knnlm``."""

import sys

from fairseq_knnlm.cli import main

sys.exit(main())
