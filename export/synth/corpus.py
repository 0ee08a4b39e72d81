"""The training corpus of the synthetic checkpoints' small tokenizer: typical video prompts.

Written for this purpose, in English and Chinese. The last lines list frequent Chinese characters, so that prompts on
other subjects become characters instead of unknown tokens.
"""

from wan22.sampling import NEGATIVE_PROMPT

ENGLISH = """\
A red fox runs through fresh snow in a quiet forest, soft morning light, cinematic close-up.
Two anthropomorphic cats in comfy boxing gear and bright gloves fight intensely on a spotlighted stage.
A sailing boat crosses a calm bay at sunset, gentle waves reflecting golden light, wide shot.
An old fisherman mends his nets on a wooden pier while seagulls circle above the harbor.
A young woman with long dark hair walks along a rainy street at night, neon signs reflecting in puddles.
A drone flies over a green valley with a winding river, low clouds drifting between the mountains.
A golden retriever puppy plays with a ball in the garden, shallow depth of field, slow motion.
A chef tosses vegetables in a hot pan, flames rising, steam and sparks, handheld camera.
Macro shot of a drop of water falling into a cup of tea, ripples spreading in circles.
A train crosses a stone bridge in autumn, colorful leaves falling, the camera follows from the side.
Astronauts walk across a dusty red planet, a small rover behind them, the sun low over the horizon.
A white cat wearing sunglasses sits on a surfboard at the beach, blurred sea in the background.
Time lapse of a flower opening its petals, black background, studio lighting, high detail.
A crowd of people holding umbrellas crosses a busy intersection in a big city, seen from above.
A blacksmith hammers glowing iron in a dark workshop, sparks flying in every direction.
An elderly couple dances slowly in a living room with warm lamps and an old record player.
A paper boat floats down a small stream, passing stones and moss, the camera close to the water.
A robot made of rusty metal waters plants on the roof of a tall building at dawn.
Children fly kites on a hill, strong wind in the grass, bright blue sky with white clouds.
A jellyfish drifts through deep blue water, glowing softly, dreamlike and peaceful.
A horse gallops along the shore, splashing water, backlit by the evening sun, tracking shot.
A busy night market with food stalls, smoke, lanterns and people eating noodles.
A ballet dancer turns on an empty stage, a single spotlight, dust floating in the air.
Snow falls on a small village, lights glow in the windows, a dog runs across the road.
A panda eats bamboo leaves, looks up at the camera and slowly blinks.
A sports car drives along a coastal road, aerial view, waves breaking on the rocks below.
A hummingbird hovers in front of a purple flower, wings moving fast, extreme close-up.
A boy in a yellow raincoat jumps into a puddle, water splashing, laughing happily.
Hot air balloons rise over a desert at sunrise, long shadows on the sand.
A girl reads a book under a tree, the wind turns the pages, sunlight through the leaves.
A medieval castle on a cliff during a thunderstorm, lightning, heavy rain, dramatic atmosphere.
A waterfall in a tropical forest, mist and a rainbow, birds flying past.
An astronaut plays the piano on the moon, the earth rising behind, realistic style.
A wooden toy train runs around a Christmas tree, warm light, tilt-shift lens.
A street musician plays the violin in an old town square, people stop and listen.
A tiger walks slowly towards the camera through tall grass, intense eyes, natural light.
A bowl of ramen with an egg, steam rising, chopsticks lifting noodles, food photography.
A spaceship lands in a field of wheat at night, bright lights, the camera tilts up.
A baby elephant splashes in a muddy river while its mother stands beside it.
The camera pans from left to right, then zooms in on a clock on the wall of an empty station.
A glass of water breaks on the floor in slow motion, fragments flying towards the viewer.
A painter draws a portrait of a woman in a studio, brush strokes in oil, soft window light.
A medium shot of a man in a grey suit talking on the phone while walking through an office.
Cherry blossoms fall on a quiet pond with orange fish, a wooden bridge in the background.
A cyclist rides down a mountain road, the view from behind, fast movement, motion blur.
Underwater view of a sea turtle swimming over a coral reef among small colorful fish.
A lighthouse on a rocky island, its beam turning in the fog, the sea rough and dark.
A cartoon bear and a rabbit share a cake at a picnic, three-dimensional animation, bright colors.
A wolf howls on a hill under a full moon, stars moving across the sky.
Fireworks over a river, reflections in the water, thousands of people watching from the bridges.
A camera moves slowly through a library with very high shelves and a spiral staircase.
A bee lands on a sunflower, pollen on its legs, summer afternoon, high resolution.
A dragon made of smoke flies over an ancient city, epic fantasy, volumetric light.
The woman smiles, turns her head and looks out of the window, her hair moving in the wind.
A skateboarder jumps over stairs in an empty street, low angle, evening light.
A vintage film of a family having dinner in the garden, grain and faded colors.
A penguin slides on ice into the water, followed by many others, documentary style.
A cup of coffee on a table, the steam forms the shape of a heart, warm morning mood.
An owl opens its big eyes and turns its head, moonlight, dark forest behind it.
A green apple and 3 yellow lemons (12 kg) on a kitchen scale; who weighs more? Price: $4.50 + 8% = 'cheap'!
Shot on 35mm, 24 fps, f/1.8 @ 1280x720 & 832*480 - no text, "no watermark" [best quality] #1 ~ 90%.
"""

CHINESE = """\
一只红色的狐狸在清晨的雪地里奔跑，阳光柔和，电影感特写镜头。
两只拟人化的猫穿着舒适的拳击装备，在聚光灯照亮的舞台上激烈战斗。
夕阳下，一艘帆船缓缓驶过平静的海湾，金色的光在波浪上闪烁，远景。
老渔夫坐在木码头上修补渔网，海鸥在港口上空盘旋。
年轻女子走在下雨的夜晚街道上，霓虹灯倒映在水面，长发随风飘动。
无人机飞过绿色的山谷，河流弯弯曲曲，低低的云在群山之间移动。
一只金毛小狗在花园里玩球，浅景深，慢动作，背景虚化。
厨师在热锅里翻炒蔬菜，火焰升起，手持镜头，烟雾缭绕。
一滴水落入茶杯，水波一圈圈散开，微距拍摄，画面清晰。
秋天的火车驶过石桥，彩色的树叶飘落，镜头从侧面跟随。
宇航员在红色的星球上行走，身后有一辆小车，太阳接近地平线。
一只戴着墨镜的白猫坐在冲浪板上，海滩背景模糊，夏日气氛。
花朵慢慢开放的延时摄影，黑色背景，摄影棚灯光，细节丰富。
大城市的十字路口，许多人撑着雨伞走过，从上方俯拍。
铁匠在昏暗的工作室里敲打烧红的铁，火花四处飞溅。
一对老夫妻在温暖的客厅里慢慢跳舞，旁边放着旧唱片机。
纸船顺着小溪漂流，经过石头和青苔，镜头贴近水面。
生锈的机器人在高楼的屋顶上给植物浇水，黎明时分。
孩子们在山坡上放风筝，草被大风吹动，蓝天白云。
水母在深蓝色的海水中漂浮，发出柔和的光，梦幻而安静。
一匹马沿着海边飞奔，水花四溅，傍晚逆光，跟踪镜头。
热闹的夜市，小吃摊、灯笼和吃面的人们，烟火气十足。
芭蕾舞者在空旷的舞台上旋转，一束灯光，空气中有灰尘。
雪落在小村庄里，窗户里亮着灯，一只狗跑过马路。
大熊猫吃着竹叶，抬头看向镜头，慢慢眨眼。
跑车沿着海岸公路行驶，航拍视角，海浪拍打着下面的岩石。
小男孩穿着黄色雨衣跳进水坑，开心地笑着。
热气球在沙漠上空升起，日出时分，沙地上有长长的影子。
女孩在树下看书，风翻动书页，阳光穿过树叶照在脸上。
悬崖上的古老城堡，雷雨交加，闪电划过天空，气氛紧张。
热带森林里的瀑布，水雾和彩虹，鸟儿飞过。
街头音乐家在老城广场上拉小提琴，人们停下来听。
老虎穿过高高的草丛，慢慢走向镜头，眼神锐利，自然光。
一碗热气腾腾的拉面，筷子夹起面条，美食摄影。
飞船夜里降落在麦田中，灯光明亮，镜头向上移动。
小象在泥泞的河里玩水，妈妈站在旁边。
镜头从左向右平移，然后推近车站墙上的钟。
玻璃杯掉在地上摔碎，慢动作，碎片飞向观众。
画家在画室里画一位女子的肖像，油画笔触，窗边的光线柔和。
穿灰色西装的男人一边打电话一边走过办公室，中景。
樱花飘落在安静的池塘里，橙色的鱼游动，背景是木桥。
水下视角，海龟游过珊瑚礁，周围有许多彩色小鱼。
岩石岛上的灯塔，光束在雾中转动，大海汹涌而黑暗。
卡通熊和兔子在草地上分享蛋糕，三维动画，色彩鲜艳。
狼在满月下的山顶嚎叫，星星在天空中移动。
河上的烟花，水中的倒影，成千上万的人在桥上观看。
蜜蜂落在向日葵上，腿上沾着花粉，夏天的下午，高清画质。
烟雾形成的龙飞过古代城市，史诗奇幻风格，体积光。
女人微笑着转过头，看向窗外，头发被风吹起。
中国古代仙侠风格，一位白衣少年站在山峰上，手持长剑，云海翻腾。
赛博朋克城市的夜景，高楼大厦之间飞行的汽车，紫色和蓝色的灯光。
春节的街道上挂满红灯笼，舞龙的队伍穿过人群，锣鼓声声。
水墨画风格，一叶小舟在江上，远处的山若隐若现。
一个宇航员在月球上弹钢琴，地球在身后升起，真实风格。
画面静止，细节模糊，色调过曝，最差质量，低质量，多余的手指，画得不好的脸部，三条腿，倒着走。
"""

FREQUENT = """\
的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实
日军者意无力它与长把机十民第公此已工使情明性知全三又关点正业外将两高间由问很最重并物手应战向头文体政美相见被利什二等产或新己制身果加西月话合回特代内信表化老给世位次度门任常先海通教儿原东声提立及比员解水
名真论处走义各入几口认条平系气题活尔更别打女变四神总何电数安少报才结反受目太量再感建务做接必场件计管期市直德资命山金指克许统区保至队形社便空决治展马科司五基眼书非则听白却界达光放强即像难且权思王象完设式
色路记南品住告类求据程北边死张该交规万取拉格望觉术领共确传师观清今切院让识候带导争运笔城花风雨雪云火树草鸟鱼猫狗红黄蓝绿黑灰紫春夏秋冬夜晨早晚左右快慢冷热远近前后里外男孩老少爱笑哭唱跳跑飞站坐吃喝看听
"""


def lines() -> list[str]:
    """The training sentences: both languages, then every frequent character on its own."""
    return [*ENGLISH.splitlines(), *CHINESE.splitlines(), NEGATIVE_PROMPT, *FREQUENT.replace("\n", "")]
