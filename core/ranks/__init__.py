"""Several ranks as one executor: processes that are started, given every step, and watched.

`executor` is the engine's half, `worker` the half of each rank, `messages` what crosses between them;
`launch` starts ranks on this machine and `cluster` lets other machines join.
"""
