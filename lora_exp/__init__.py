"""How few trainable parameters are enough to adapt a language model, and where should they go?

    conf/ -> config -> data -> models -> lora -> train -> report
                      tokens   frozen    adapters the loop  tables, plots
                               base

`config` says what a run is, `data` makes rows of tokens once, `models` builds the frozen base, `lora` puts adapters
on it, `step` is the pure compiled step over a pack of trials, `train` the visible loop, `report` turns the files of a
run into tables and plots. A module imports only from the modules to its left:

    config < screen < cache < logger < spectrum < report < dashboard < mesh < fusion < dropout < lora < models
    < weights < data < loss < pack < flops < step < loop < teacher < build < base < memory < plan < checkpoint
    < outputs < runs < evaluate < merge < inspect < export < decode < generate < promises < answers < trial < train
    < sweep < __main__
"""

__version__ = "0.1.0"
