"""``rnnkern demo``: train a character language model with torch.nn and with rnnkern, side by side.

How data flows::

    corpus    text file or standard library -> vocabulary, training streams, held-out streams
    model     embedding -> recurrent layers -> linear; sampling; the saved model file
    train     two models, same weights, same batches, in alternating rounds -> losses, seconds, bits
    report    losses, seconds, bits -> table and picture
    options   names, ranges and defaults of the command line
    command   the order in which the above is done

``errors``, ``files`` and ``machine`` hold what the rest leans on: one-line errors and optional
imports, checked and atomic writing, and what the operating system tells about the machine.
"""
