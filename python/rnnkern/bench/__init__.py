"""``rnnkern bench``: the CPU kernels against other libraries and the machine's limits.

cases: what is measured. contenders: who runs it. measure, memory, roofline: how. limit: what this
machine could do at best. targets: what is wanted. report, markdown, plot: what is shown.
"""
