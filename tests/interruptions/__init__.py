"""Commands are disturbed at every call that changes a file, and power is lost after each; the next
run must end with what an undisturbed one leaves, and nothing else.

shim.c       is preloaded into the commands; it numbers their calls, and disturbs one
shim.py      builds it, and sets its control page
runs.py      the commands, their inputs, and what an undisturbed run leaves
power.py     what is found after power was lost, from a record of all calls
sweep.py     runs the cases in forked processes, and judges them
__main__.py  all of them, as a table: `make interruptions`
"""
