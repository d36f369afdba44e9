"""The words of TinyWorld: pools from which a seed draws its people and towns, and what holds in every world."""

from __future__ import annotations

WOMEN = (
    "Mira", "Anna", "Lena", "Ida", "Nora", "Rosa", "Tilda", "Ella", "Maya", "Lucy", "Clara", "Emma",
    "Ruth", "Vera", "Jane", "Alma", "Dora", "Greta", "Hana", "Iris", "Kira", "Lily", "Olga", "Zoe",
)  # fmt: skip
MEN = (
    "Tom", "Ben", "Max", "Leo", "Sam", "Paul", "Otto", "Finn", "Hugo", "Jack", "Karl", "Adam",
    "Noah", "Oscar", "Peter", "Rudi", "Simon", "Tim", "Udo", "Viktor", "Walter", "Emil", "Felix", "Bruno",
)  # fmt: skip
TOWNS = (
    "Arlen", "Borun", "Calder", "Dalby", "Elmet", "Farrow", "Hadley", "Ivern", "Kelso", "Lunden", "Norby",
    "Orrin", "Pelham", "Rosten", "Selby", "Tarnow", "Ulmet", "Verden", "Wicken", "Yarrow",
)  # fmt: skip
PET_NAMES = (
    "Pip", "Momo", "Bobo", "Fluff", "Dot", "Socks", "Button", "Pebble", "Nutmeg", "Misty", "Shadow", "Sunny",
    "Coco", "Rex", "Lulu", "Toby", "Daisy", "Bella", "Milo", "Spot", "Pepper", "Ginger", "Bubbles", "Ziggy",
    "Kiki", "Zaza", "Pogo", "Fips", "Juno", "Muffin", "Tuk", "Bim",
)  # fmt: skip

# job: (work place, tool)
JOBS: dict[str, tuple[str, str]] = {
    "baker": ("bakery", "oven"), "farmer": ("farm", "plough"), "teacher": ("school", "blackboard"),
    "doctor": ("hospital", "bandage"), "painter": ("studio", "brush"), "singer": ("theatre", "harp"),
    "driver": ("garage", "truck"), "sailor": ("harbour", "compass"), "miller": ("mill", "millstone"),
    "tailor": ("shop", "needle"), "gardener": ("park", "spade"), "cook": ("kitchen", "spoon"),
    "potter": ("workshop", "wheel"), "weaver": ("hall", "loom"), "carpenter": ("yard", "saw"),
    "librarian": ("library", "stamp"), "fisher": ("beach", "net"), "shepherd": ("meadow", "stick"),
    "smith": ("forge", "hammer"), "judge": ("court", "scroll"), "beekeeper": ("orchard", "veil"),
    "postman": ("station", "bicycle"), "miner": ("mine", "lamp"), "guard": ("gate", "whistle"),
}  # fmt: skip

PET_KINDS = (
    "cat", "dog", "rabbit", "horse", "duck", "goat", "hen", "mouse", "parrot", "turtle", "pony", "hamster",
)  # fmt: skip
PET_COLOURS = ("black", "white", "brown", "grey", "golden", "silver")
HAT_COLOURS = ("red", "blue", "green", "yellow", "purple", "pink", "black", "white")
HOBBIES = (
    "sing",
    "dance",
    "read",
    "swim",
    "paint",
    "run",
    "sew",
    "juggle",
    "draw",
    "whistle",
    "climb",
    "sail",
)

LANDMARKS = ("bridge", "tower", "windmill", "well", "statue", "market", "lighthouse", "fountain")
NATURE = ("sea", "hill", "river", "forest", "lake", "valley", "mountain", "swamp")
PRODUCTS = ("honey", "cheese", "paper", "glass", "wool", "salt", "bells", "boats")
FLAG_COLOURS = ("red", "blue", "green", "yellow", "purple", "pink", "black", "white")

# animal: (sound, legs, home, food, young); empty where TinyWorld has no answer
ANIMALS: dict[str, tuple[str, str, str, str, str]] = {
    "cow": ("moo", "four", "barn", "grass", "calf"),
    "sheep": ("baa", "four", "field", "grass", "lamb"),
    "dog": ("woof", "four", "kennel", "meat", "puppy"),
    "cat": ("meow", "four", "house", "fish", "kitten"),
    "duck": ("quack", "two", "pond", "weeds", "duckling"),
    "hen": ("cluck", "two", "coop", "corn", "chick"),
    "horse": ("neigh", "four", "stable", "hay", "foal"),
    "pig": ("oink", "four", "sty", "roots", "piglet"),
    "frog": ("croak", "four", "pond", "flies", "tadpole"),
    "bee": ("buzz", "six", "hive", "nectar", ""),
    "owl": ("hoot", "two", "tree", "mice", "owlet"),
    "mouse": ("squeak", "four", "hole", "seeds", ""),
    "lion": ("roar", "four", "den", "meat", "cub"),
    "bear": ("growl", "four", "cave", "berries", "cub"),
    "snake": ("hiss", "", "pit", "eggs", ""),
    "wolf": ("howl", "four", "forest", "meat", "cub"),
    "spider": ("", "eight", "web", "flies", ""),
    "rabbit": ("", "four", "burrow", "carrots", ""),
}

# food: (plural, colour, taste, source)
FOODS: dict[str, tuple[bool, str, str, str]] = {
    "apples": (True, "red", "sweet", "trees"),
    "lemons": (True, "yellow", "sour", "trees"),
    "plums": (True, "purple", "sweet", "trees"),
    "carrots": (True, "orange", "sweet", "the ground"),
    "potatoes": (True, "brown", "", "the ground"),
    "berries": (True, "blue", "sour", "bushes"),
    "olives": (True, "black", "bitter", "trees"),
    "peas": (True, "green", "sweet", "pods"),
    "pickles": (True, "green", "sour", "jars"),
    "nuts": (True, "brown", "", "bushes"),
    "eggs": (True, "white", "", "hens"),
    "cheese": (False, "yellow", "salty", "milk"),
    "bread": (False, "brown", "", "flour"),
    "milk": (False, "white", "sweet", "cows"),
    "fish": (False, "silver", "salty", "the sea"),
    "tea": (False, "brown", "bitter", "leaves"),
}
LIKED_FOODS = (
    "apples", "plums", "carrots", "potatoes", "berries", "olives", "peas", "pickles", "nuts", "eggs", "cheese",
    "fish",
)  # fmt: skip

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
    "November", "December",
)  # fmt: skip
# month index // 3 after moving December to the front
SEASONS = ("winter", "spring", "summer", "autumn")
SEASON_WEATHER = {"winter": "snow", "spring": "rain", "summer": "sunshine", "autumn": "wind"}

OPPOSITES = (
    ("big", "small"), ("hot", "cold"), ("fast", "slow"), ("old", "new"), ("long", "short"), ("dark", "bright"),
    ("wet", "dry"), ("full", "empty"), ("happy", "sad"), ("loud", "quiet"), ("clean", "dirty"), ("hard", "soft"),
    ("high", "low"), ("early", "late"), ("rich", "poor"), ("open", "closed"),
)  # fmt: skip
MATERIALS = {
    "table": "wood", "chair": "wood", "window": "glass", "bottle": "glass", "coat": "wool", "scarf": "wool",
    "letter": "paper", "map": "paper", "pot": "clay", "bowl": "clay", "key": "iron", "nail": "iron",
    "ring": "gold", "crown": "gold", "wall": "stone", "road": "stone", "candle": "wax", "boot": "leather",
}  # fmt: skip
TOOL_USES = {
    "knife": "cut", "needle": "sew", "broom": "sweep", "pen": "write", "brush": "paint", "spade": "dig",
    "pan": "fry", "kettle": "boil", "ladder": "climb", "rope": "pull", "bed": "sleep", "cup": "drink",
}  # fmt: skip
SENSES = {"eyes": "see", "ears": "hear", "nose": "smell", "tongue": "taste", "hands": "touch"}

NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
# Things that people own, find, count and give away: (one, many)
THINGS = (
    ("apple", "apples"), ("book", "books"), ("coin", "coins"), ("shell", "shells"), ("stone", "stones"),
    ("flower", "flowers"), ("candle", "candles"), ("button", "buttons"), ("cake", "cakes"), ("pen", "pens"),
    ("plum", "plums"), ("nut", "nuts"), ("card", "cards"), ("bell", "bells"),
)  # fmt: skip
CONTAINERS = (("box", "boxes"), ("bag", "bags"), ("basket", "baskets"), ("jar", "jars"))


def with_article(noun: str) -> str:
    """The noun behind "a" or "an"."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
