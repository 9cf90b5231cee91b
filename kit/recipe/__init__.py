"""A recipe: one YAML file that names table entries and their keyword arguments.

What a command takes is a `Schema`; the keys of a section are the keyword-only parameters of the
entry it names. All that is wrong with a recipe is reported at once, with file, line and the
nearest valid word.
"""

from kit.recipe.reading import Recipe as Recipe
from kit.recipe.reading import change as change
from kit.recipe.reading import find_recipe as find_recipe
from kit.recipe.reading import look_up as look_up
from kit.recipe.reading import read as read
from kit.recipe.schema import ExistingFile as ExistingFile
from kit.recipe.schema import ExistingFolder as ExistingFolder
from kit.recipe.schema import Schema as Schema
from kit.recipe.schema import Section as Section
from kit.recipe.schema import Stack as Stack
from kit.recipe.schema import json_schema as json_schema
