"""Activities that the stories of the demonstration corpus are about, with sentences of their own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Activity:
    """One thing to learn: its verb forms, its tool, and how it goes wrong and right."""

    base: str
    gerund: str
    past: str
    participle: str
    stems: tuple[str, ...]
    tool: str
    thing: str
    fails: tuple[str, ...]
    tips: tuple[str, ...]
    wins: tuple[str, ...]
    shows: tuple[str, ...]


def _regular(base: str, tool: str, thing: str, *, stem: str = "", past: str = "", gerund: str = "") -> tuple:
    """Return the leading fields of a regular verb."""
    past = past or base + "ed"
    return base, gerund or base + "ing", past, past, (stem or base,), tool, thing


ACTIVITIES = (
    Activity(
        *_regular("paint", "a brush and three pots of paint", "brush"),
        ("The paint ran down the page, and the picture looked like a puddle of mud.",
         "There was more paint on the floor than on the paper.",
         "{N} tried to paint a tree, but it looked like a broken umbrella."),
        ("Look at the light first, and let the brush move slowly",
         "Paint what you feel, and the colours will follow"),
        ("{N} painted the evening sky, with a red sun and a thin golden cloud.",
         "{N} painted a garden so bright that a bee tried to land on it.",
         "{N} painted a portrait of {H}, and every line was full of love."),
        ("Everyone who saw the painting stood still and smiled.",
         "Someone hung the painting on the wall, where all could see it."),
    ),
    Activity(
        "sing", "singing", "sang", "sung", ("sing", "sang", "sung", "song"), "a little song book", "song book",
        ("The first song sounded like a rusty door.",
         "The high notes squeaked, and the low notes would not come at all."),
        ("Breathe deeply, and sing as if you were telling a secret",
         "Start with a soft song, and listen to every note"),
        ("{N} sang a gentle song about the moon, and even the wind grew quiet.",
         "{N} sang loud and clear, and every note was in the right place."),
        ("Soon everyone was singing along.", "People opened their windows to hear the song."),
    ),
    Activity(
        *_regular("cook", "a big pot and a wooden spoon", "wooden spoon"),
        ("The soup tasted of salt, and the kitchen was full of smoke.",
         "The cook book said ten minutes, but the pan was black after five."),
        ("Taste a little, wait a little, and never cook in a hurry",
         "Good cooks use fresh herbs and keep the fire low"),
        ("{N} cooked a thick vegetable soup that smelled of summer.",
         "{N} cooked dumplings with mushrooms, and there was not a crumb left."),
        ("Everyone asked for a second plate and praised the cook.", "All the guests wanted to know who had cooked it."),
    ),
    Activity(
        *_regular("sail", "a white sail for a tiny boat", "sail"),
        ("The sail flapped, and the boat only turned in circles.",
         "A gust of wind caught the sail, and {N} fell into the water."),
        ("Feel the wind on your face before you pull the sail", "Do not fight the wind, but sail along with it"),
        ("{N} sailed straight across the water and back, and the boat danced on the waves.",
         "{N} sailed around the red buoy as smoothly as a swan."),
        ("People on the shore waved their hats at the little sail.", "The old captains cheered when the sail came in."),
    ),
    Activity(
        "dance", "dancing", "danced", "danced", ("danc",), "a long red ribbon", "ribbon",
        ("After two steps of the dance, {N} fell over a chair.",
         "Left and right got mixed up, and the dance ended on the floor."),
        ("Do not count the steps, but let the music carry your dance",
         "Dance slowly first, and the quick steps will come later"),
        ("{N} danced across the room as lightly as a leaf.", "{N} danced with three turns and a jump, and never fell."),
        ("Before long the whole crowd was dancing.", "Everyone clapped in time with the dance."),
    ),
    Activity(
        "swim", "swimming", "swam", "swum", ("swim", "swam", "swum"), "a blue swimming cap", "cap",
        ("{N} swallowed a lot of water and could not swim one metre.",
         "After one stroke, the swimming lesson ended with a cough and a splash."),
        ("Trust the water, and swim with long, calm strokes",
         "First learn to float, and the swimming will come by itself"),
        ("{N} swam from one side to the other without a rest.", "{N} swam like an otter, and the water sparkled."),
        ("Everyone who watched the swimming cheered.", "Two ducks swam behind in a line."),
    ),
    Activity(
        "bake bread", "baking bread", "baked bread", "baked bread", ("bak", "bread"),
        "a sack of flour and a baking tin", "baking tin",
        ("The bread came out of the oven as hard as a stone.", "The bread was black outside and wet inside."),
        ("Give the bread time to rise, for it cannot be rushed", "Bake with warm hands and a patient heart"),
        ("{N} baked a round loaf of bread with a crisp, golden crust.",
         "{N} baked bread with nuts and honey, and the whole street smelled of it."),
        ("Everyone wanted a slice of the warm bread.", "There was not a crumb of bread left."),
    ),
    Activity(
        "write poems", "writing poems", "wrote poems", "written poems", ("poem",), "a blue notebook", "notebook",
        ("The first poem had only four words, and two of them were wrong.",
         "The page stayed empty, and the only poem ended in the bin."),
        ("Write a poem about something you love", "Read your poem aloud, and you will hear what is missing"),
        ("{N} wrote a poem about the first snow, and every line rang like a bell.",
         "{N} read out a poem about friendship in a clear voice."),
        ("Some of the listeners wiped away a tear after the poem.", "Everyone wanted a copy of the poem."),
    ),
    Activity(
        "play the drum", "playing the drum", "played the drum", "played the drum", ("drum",), "an old tin drum", "drum",
        ("The drum was so loud and wild that the birds flew away.",
         "One stick broke, and the other flew over the drum."),
        ("Listen to your heart, for it is the oldest drum of all", "Let the drum speak softly before it shouts"),
        ("{N} played the drum with a steady beat that made every foot tap.",
         "{N} let the drum whisper like rain and then roll like thunder."),
        ("Soon everyone was clapping along with the drum.", "Even the babies bounced to the sound of the drum."),
    ),
    Activity(
        "play the flute", "playing the flute", "played the flute", "played the flute", ("flute",),
        "a wooden flute", "flute",
        ("The flute gave only a hiss, like a kettle on the fire.", "The flute squeaked so badly that a dog ran away."),
        ("Blow gently, as if the flute were asleep", "Learn one tune on the flute and learn it well"),
        ("{N} played the flute so sweetly that the birds joined in.",
         "{N} played a slow tune on the flute, and the air seemed to shine."),
        ("Nobody spoke until the flute was silent.", "Everyone asked to hear the flute once more."),
    ),
    Activity(
        "read", "reading", "read", "read", ("read", "book"), "a thick book with pictures", "book",
        ("The letters seemed to jump around, and reading one line took an hour.",
         "{N} read the same word ten times and still got it wrong."),
        ("Read one word at a time, and the story will come to you", "Put your finger under the line, and read aloud"),
        ("{N} read a whole tale aloud, with a deep voice for the giant.",
         "{N} read a fairy tale from beginning to end without one mistake."),
        ("Everyone begged {him} to read one more page.",
         "The listeners sat as still as stones until the book was closed."),
    ),
    Activity(
        "draw", "drawing", "drew", "drawn", ("draw", "drew"), "a soft pencil and some paper", "pencil",
        ("{N} tried to draw a horse, but it looked like a table with a tail.",
         "The pencil broke twice, and the drawing was full of holes."),
        ("Draw what you see, and not what you think you see", "Begin the drawing with one simple line"),
        ("{N} drew the old bridge with every stone in its place.",
         "{N} drew {H} laughing, and the drawing seemed to be alive."),
        ("The drawing went from hand to hand, and everyone praised it.",
         "The drawing was put in a frame that same day."),
    ),
    Activity(
        "grow flowers", "growing flowers", "grew flowers", "grown flowers", ("flower",),
        "a small spade and a bag of seeds", "spade",
        ("The first flowers got too much water and turned brown.", "The snails ate every flower in one night."),
        ("Flowers need sun, water and a little patience", "Talk to your flowers, and look at them every morning"),
        ("{N} grew flowers in red, white and blue, and butterflies came from far away.",
         "{N} grew a flower as tall as a door, with petals of gold."),
        ("Everyone stopped to smell the flowers.", "People came from the next town to see the flowers."),
    ),
    Activity(
        *_regular("knit", "two needles and a ball of wool", "ball of wool", past="knitted", gerund="knitting"),
        ("The knitting turned into one big knot.", "{N} wanted to knit a sock, but it came out with three holes."),
        ("Knit one row at a time, and do not pull too hard",
         "Count your stitches, and the knitting will stay straight"),
        ("{N} knitted a long, soft scarf with yellow stripes.",
         "{N} knitted warm gloves for {H}, and they fitted well."),
        ("Everyone wanted to touch the soft knitting.", "The knitting was passed around and admired."),
    ),
    Activity(
        "fly a kite", "flying a kite", "flew a kite", "flown a kite", ("kite",), "a paper kite with a green tail",
        "kite",
        ("The kite dived into a bush and tore its tail.",
         "{N} ran until {he} was tired, but the kite stayed on the grass."),
        ("Wait for the wind, and give the kite more string", "Stand with your back to the wind, and let the kite rise"),
        ("{N} flew the kite so high that it looked like a tiny star.",
         "The kite rose at once, and {N} made it dance in the sky."),
        ("Everyone looked up and waved at the kite.", "The children ran after the shadow of the kite."),
    ),
    Activity(
        "ride a bike", "riding a bike", "rode a bike", "ridden a bike", ("bike",), "an old green bike", "bike",
        ("The bike wobbled left and right and ended in a hedge.", "{N} and the bike lay in a puddle after two metres."),
        ("Look ahead, and not at the wheels of the bike", "Keep the bike rolling, and it will hold you up"),
        ("{N} rode the bike down the lane with the wind in {his} face.",
         "{N} rode the bike in a perfect circle and rang the bell."),
        ("Everyone cheered as the bike flew past.", "The children ran next to the bike and shouted with joy."),
    ),
    Activity(
        "juggle", "juggling", "juggled", "juggled", ("juggl",), "a bag of three bright balls", "bag",
        ("Juggling looked easy, but one ball hit a window.",
         "The balls rolled away, and the juggling was over in a second."),
        ("Juggle with two balls first, and watch the highest one",
         "Throw softly, and the juggling will find its own beat"),
        ("{N} juggled three balls, then four, and then five apples.",
         "{N} juggled with closed eyes and caught every ball."),
        ("Everyone gasped at the juggling.", "The children wanted to learn juggling at once."),
    ),
    Activity(
        *_regular("fish", "a long fishing rod", "rod"),
        ("{N} caught no fish, but only an old boot.", "The line got stuck in a tree, and the fish seemed to laugh."),
        ("Sit still, and let the fish come to you", "Fishing is mostly waiting, so enjoy the quiet"),
        ("{N} caught a silver fish as long as an arm and gently let it go again.",
         "{N} fished for an hour and caught enough for a feast."),
        ("Everyone wanted to hear about the big fish.", "The fish shone in the sun, and people cheered."),
    ),
    Activity(
        "sew", "sewing", "sewed", "sewn", ("sew",), "a needle and a reel of blue thread", "needle",
        ("The thread tangled, and {N} sewed {his} own sleeve to the cloth.",
         "The seam was so bad that the sewing fell apart."),
        ("Sew with small stitches, and take your time", "Sewing is easy when the thread is short"),
        ("{N} sewed a bright coat with silver buttons.", "{N} sewed a flag so fine that it seemed to float."),
        ("Everyone felt the cloth and praised the sewing.", "No one could believe that it had been sewn by hand."),
    ),
    Activity(
        "play chess", "playing chess", "played chess", "played chess", ("chess",), "a wooden chess board",
        "chess board",
        ("The first game of chess was lost after four moves.",
         "{N} forgot how the knight moves and lost at chess again."),
        ("In chess you must think twice and move once", "Every lost game of chess is a good teacher"),
        ("{N} played chess against {H} and won with a quiet little move.",
         "{N} played a long game of chess and found a clever way out."),
        ("Everyone gathered around the chess board in wonder.", "People talked about that game of chess for weeks."),
    ),
    Activity(
        "take photos", "taking photos", "took photos", "taken photos", ("photo",), "an old camera", "camera",
        ("The first photo showed only a thumb.", "Every photo was dark, and one was upside down."),
        ("Wait for the right moment, and the photo will make itself",
         "Come closer to what you love before you take the photo"),
        ("{N} took a photo of a drop of rain with the whole sky in it.",
         "{N} took a photo of {H} in the golden light of the evening."),
        ("Everyone wanted to see the photo.", "The photo was soon on the wall of the town hall."),
    ),
    Activity(
        *_regular("climb trees", "a strong rope", "rope", stem="climb", past="climbed trees", gerund="climbing trees"),
        ("After the first branch, {N} slid down, and the climb was over.",
         "{N} climbed too fast and hung from a branch like a wet sock."),
        ("Climb with your eyes first, and then with your feet", "Hold on with three limbs while you climb"),
        ("{N} climbed the tallest oak and saw the whole land from the top.",
         "{N} climbed up branch by branch and brought down a lost kitten."),
        ("Everyone watched the climb with open mouths.", "The whole crowd cheered when the climb was done."),
    ),
    Activity(
        "tell jokes", "telling jokes", "told jokes", "told jokes", ("joke",), "a small joke book", "joke book",
        ("{N} forgot the end of the first joke, and nobody laughed.",
         "The joke was so long that a listener fell asleep."),
        ("Keep the joke short, and smile before the end", "Tell the joke to one friend, and not to the whole room"),
        ("{N} told a joke about a goose and a hat, and it was perfectly timed.",
         "{N} told three jokes in a row, and each was funnier than the last."),
        ("Everyone laughed at the jokes until it hurt.",
         "One listener laughed so hard at the joke that a button popped off."),
    ),
    Activity(
        "play the piano", "playing the piano", "played the piano", "played the piano", ("piano",),
        "a book of piano tunes", "piano book",
        ("The piano sounded as if a cat were walking over the keys.", "Two fingers got stuck between the piano keys."),
        ("Let each hand learn its part of the piano tune alone", "Play the piano slowly, and hear the silence too"),
        ("{N} played the piano as softly as falling snow.", "{N} played a merry dance on the piano with both hands."),
        ("Everyone hummed the piano tune on the way home.",
         "The last note of the piano hung in the air for a long time."),
    ),
)  # fmt: skip
BY_BASE = {activity.base: activity for activity in ACTIVITIES}
