"""Drop-in replacements: the names, arguments and return values of other MLA libraries.

`mla_core.dropin.aiter` and `mla_core.dropin.flash_mla` translate calls written for those libraries
to the ops of `mla_core`, so that whatever backend is selected serves them.
"""
