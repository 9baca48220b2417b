"""fairseq's edge: the task ``knn_lm``, from flags to options. Importing it registers the task."""

from fairseq_knnlm.tasks.host import settle_in

settle_in()  # before the task, whose imports may already have something to say to the user

from fairseq_knnlm.tasks import hf_causal_lm, hf_tokenizer, knn_lm  # noqa: E402, F401
