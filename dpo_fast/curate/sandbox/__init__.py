"""Programs that are hostile until proven otherwise.

processes  children that can be killed with everything they started
output     what they print, up to a limit
"""
