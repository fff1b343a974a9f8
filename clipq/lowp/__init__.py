"""Low-precision linear layers for any model; needs nothing but torch (and Triton on a GPU).

from clipq.lowp import convert_linears
print(convert_linears(model, "switchback", filter=lambda name, layer: "blocks" in name))
"""

from clipq.lowp.convert import ConversionReport, convert_linears, quantized_once
from clipq.lowp.linear import LowpLinear, linear
from clipq.lowp.recipe import RECIPES, LinearRecipe, Operand, Product, Saved, Scales, get_recipe

__all__ = [
    "RECIPES",
    "ConversionReport",
    "LinearRecipe",
    "LowpLinear",
    "Operand",
    "Product",
    "Saved",
    "Scales",
    "convert_linears",
    "get_recipe",
    "linear",
    "quantized_once",
]
