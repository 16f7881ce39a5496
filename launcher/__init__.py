"""The launcher: the command line, and everything that starts and ends processes.

It trains nothing and speaks no wire protocol. It resolves the settings, starts the roles as processes
(`python -P -m ps_accordion.server`), shows what they print, and ends them all together, whatever happens.

* `cli` is the `ps-accordion` command; each command is a module in `commands/`, loaded when it is called.
* `local` is the engine that runs a whole job on this machine.
* `outcome` decides what a run's ending was, as a pure state machine; `supervisor` carries its orders out.
* `child` starts one process so that it cannot outlive the launcher; `guard` is the watcher that sees to the rest.
"""
