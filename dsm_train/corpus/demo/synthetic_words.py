"""Vocabulary of the synthetic web: words per topic, and the sentences that all of its pages share.

A topic is a line of nouns, verbs (third person) and adjectives, apart by `|`. Many words belong to several topics on
purpose: rings and fields, powers and roots, derivatives of a share, the proof of a whisky. No topic can be told by one
word, and no word tells mathematics from everything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lexicon:
    """The words of a topic."""

    nouns: tuple[str, ...]
    verbs: tuple[str, ...]
    adjectives: tuple[str, ...]

    @classmethod
    def parse(cls, line: str) -> Lexicon:
        """Read `nouns | verbs | adjectives`, each apart by blanks."""
        nouns, verbs, adjectives = (tuple(part.split()) for part in line.split("|"))
        return cls(nouns, verbs, adjectives)


def _lexicons(topics: Mapping[str, str]) -> dict[str, Lexicon]:
    return {name: Lexicon.parse(line) for name, line in topics.items()}


GENERAL = Lexicon.parse("""
    time year day week morning place house street city town country family friend child teacher group member team
    company office market story letter book page article paper photo picture film song game idea question answer
    problem result reason point part side end start change number case example word name list note rule plan step level
    line order form kind way type piece bit thing view side hand head voice door table room window road river tree
    winter summer season weather visit talk meeting project service member report review copy version series record
    | shows gives takes brings keeps leaves needs uses wants finds helps makes follows covers explains changes opens
    starts ends meets reaches supports includes describes mentions offers allows becomes holds moves returns
    | good new old long short small large early late young simple common different important possible local public
    general clear open full free certain special recent whole main strong easy hard similar other useful
""")
"""Everybody's words: at least half of every page."""

CORE = Lexicon.parse("""
    theorem proof lemma equation formula expression variable solution identity inequality definition exercise constant
    function value set condition assumption argument corollary notation coefficient
    | proves solves equals satisfies implies denotes simplifies vanishes determines yields
    | positive negative real rational unique arbitrary finite infinite given equivalent
""")
"""Words common to formal mathematics. Physics, engineering and finance share some of them; puzzles hardly any."""

MATHEMATICS = _lexicons(
    {
        "algebra": """polynomial root factor quadratic discriminant degree monomial binomial system substitution ring field
        group ideal homomorphism unknown power fraction remainder divisor
        | factors divides cancels expands eliminates | cubic monic linear reducible symmetric commutative""",
        "calculus": """derivative integral limit series slope tangent area rate antiderivative continuity interval maximum
        sequence convergence bound curve chain substitution sum radius
        | converges differentiates integrates diverges bounds | continuous differentiable bounded smooth monotone""",
        "number theory": """prime integer divisor congruence residue modulus factorisation remainder multiple exponent sieve
        quotient totient square digit parity | divides exceeds factors reduces generates
        | prime coprime even odd composite quadratic""",
        "linear algebra": """matrix vector eigenvalue determinant basis rank kernel row column transpose projection span
        space dimension inverse subspace operator norm | spans maps projects inverts transforms
        | orthogonal diagonal singular linear invertible independent""",
        "probability": """variance expectation distribution sample event outcome density deviation estimator trial mean
        dice moment likelihood urn walk | occurs estimates converges samples weights
        | random independent conditional uniform discrete normal""",
        "topology": """manifold homotopy homology covering neighbourhood boundary sphere torus knot surface loop fibre bundle
        compactness cohomology atlas simplex retract | deforms covers glues embeds lifts
        | compact connected orientable contractible open closed""",
        "category theory": """functor morphism adjunction colimit object diagram arrow monad presheaf pullback monoid
        coproduct equaliser topos transformation embedding | commutes composes factors preserves reflects
        | natural faithful adjoint universal small abelian""",
        "combinatorics": """permutation graph vertex edge colouring tree matching subset partition pigeonhole bijection
        recurrence cycle clique counting path board tournament | counts colours connects arranges contains
        | bipartite planar distinct adjacent acyclic regular""",
        "geometry": """triangle circle angle chord bisector altitude hypotenuse polygon circumcircle median perpendicular
        parallelogram vertex midpoint ellipse locus compass tangent | intersects bisects touches inscribes reflects
        | congruent isosceles parallel concyclic acute regular""",
        "olympiad": """contest board coin token contestant pigeonhole colouring jury shortlist trick parity tournament
        invariant chessboard stone pile move configuration | colours rearranges moves pairs swaps wins
        | distinct consecutive lucky clever elegant stubborn""",
        "puzzles": """riddle puzzle coin weighing hat prisoner switch matchstick domino tile grid sudoku cube lock ferry wolf
        cabbage chessboard | weighs tiles crosses guesses swaps hides
        | clever magic missing hidden smallest counterfeit""",
        "school arithmetic": """worksheet addition subtraction multiplication division fraction decimal percentage ten digit
        carry abacus pupil column estimate remainder marble apple basket | adds subtracts carries rounds shares doubles
        | whole mixed equal remaining halved missing""",
    }
)
"""Topics of mathematics, from those of the seed to those furthest from it."""

OTHER = _lexicons(
    {
        "physics": """momentum particle energy field wave mass force photon orbit charge electron gravity telescope
        quantum temperature entropy equation oscillator spectrum vector | emits accelerates absorbs decays radiates
        | magnetic thermal relativistic nuclear classical linear""",
        "finance": """portfolio dividend share derivative bond interest yield equity loan rate investor fund inflation
        premium asset hedge return variance mortgage power | rises pays trades earns hedges
        | fixed annual volatile compound net fiscal""",
        "programming": """compiler function variable loop array string pointer server library exception query thread module
        package integer class object cache string test matrix | compiles returns imports calls throws
        | static recursive async nested mutable boolean""",
        "sports statistics": """batter average season goal striker league percentage ratio pitcher innings rebound
        tournament defence assist score record point penalty rank group | scores wins concedes leads averages
        | unbeaten regular defensive home leading total""",
        "engineering": """beam load pressure valve pump turbine torque stress circuit voltage sensor bearing bridge
        tolerance coefficient power root pipe field | rotates bears cools drives corrodes
        | hydraulic elastic structural electric rated linear""",
        "polls": """survey voter poll sample margin turnout candidate respondent percentage ballot district majority census
        household estimate distribution | polls votes samples favours weights
        | random undecided weighted electoral rural likely""",
        "law": """court proof clause contract plaintiff statute appeal evidence argument liability ruling judge claim
        assumption tenant licence definition | denies implies rules grants appeals
        | civil equivalent liable criminal valid binding""",
        "music theory": """chord scale interval harmony melody octave rhythm fifth fraction tuning string ratio bass fugue
        mode inversion sequence transposition | resolves plays transposes sounds repeats
        | minor major harmonic natural diminished slow""",
        "chess": """bishop knight pawn board opening endgame combination tournament rank file castle gambit check move piece
        diagram | captures sacrifices castles moves attacks | white black passed open isolated sharp""",
        "astrology": """sign house moon number destiny angle square trine aspect ascendant planet cycle card reader power
        root | rules enters predicts aligns opposes | lunar lucky cardinal mystic natal prime""",
        "crafts": """yarn stitch row pattern quilt triangle hexagon needle loom square angle tile edge fabric hem knot loop
        | knits sews repeats folds cuts | woollen cotton even diagonal regular square""",
        "cooking": """recipe oven flour butter onion sauce garlic pan dough spoon sugar fraction pepper dish root soup
        measure | bakes stirs simmers fries mixes | fresh warm sweet crisp whole spicy""",
        "travel": """hotel beach flight train ticket island museum castle tour harbour luggage guide village hostel map
        coast | arrives travels books sails climbs | scenic sandy cheap quiet historic coastal""",
        "health": """doctor patient vitamin sleep muscle exercise diet blood therapy symptom clinic dose heart pain stress
        trial | treats heals stretches prescribes relieves | healthy chronic mild daily mental positive""",
        "gardening": """soil seed root compost tomato rose lawn hedge pot bulb shade pruning frost bed pollen tree
        | grows waters blooms prunes plants | green sunny moist hardy organic shady""",
        "games": """level boss quest sword console player map puzzle loot patch dragon skill guild server dice score power
        | unlocks fights levels crafts spawns | rare epic hidden magic solo legendary""",
        "fashion": """dress collection designer jacket silk runway model shoe colour fabric season label leather trend cut
        | wears matches launches styles tailors | elegant casual vintage slim bold classic""",
        "film": """director actor scene matrix sequel plot camera trailer cinema screen festival script role studio cut
        | stars shoots premieres directs plays | dramatic funny dark animated silent independent""",
        "history": """king empire war treaty castle century emperor siege revolt army archive dynasty crown ruler trade
        | conquers reigns defeats signs builds | ancient royal medieval noble civil eastern""",
        "cars": """engine gear brake wheel torque hybrid mileage diesel tyre driver model dealer battery seat power range
        | drives brakes accelerates charges parks | electric fast used compact sporty reliable""",
        "news": """minister parliament police budget election protest mayor strike border reform agency speech crisis
        spokesman vote council | announces votes warns rejects proposes | national political foreign joint urgent""",
        "pets": """puppy kitten leash breed vet fur feeder cage shelter collar parrot trick rabbit bowl tail litter
        | barks feeds sleeps adopts chews | playful loyal tame fluffy curious furry""",
        "philosophy": """ethics truth argument premise logic belief mind proposition paradox knowledge identity necessity
        thinker proof conclusion | argues implies denies believes follows | moral rational necessary sceptical""",
        "property": """flat tenant rent kitchen garden garage square area agent lease balcony price floor roof value loan
        | rents sells renovates lists buys | spacious bright modern detached central furnished""",
    }
)
"""Topics that are not mathematics; the first half is near it in words or in formulas."""

SENTENCES = (
    """
The {a} {n} {v} the {n} of the {n}.|When the {n} {v} a {n}, the {n} becomes {a}.|
{Name} says that every {a} {n} {v} one {n} or another.|There is a {n} in {Place} that {v} the {a} {n}.|
It is the {n}, not the {n}, that {v} the {n}.|Without a {a} {n} no {n} {v} its {n}.|
In {Place} the {n} {v} a {n} and a {a} {n}.|A {n} {v} the {n} because the {n} is {a}.|
Most of us think of the {n} as a {a} {n}.|After the {n} comes the {n}, which {v} the {a} {n}.|
The {n} and the {n} are both {a}, yet the {n} {v} them.|How does the {n} of a {n} change when the {n} is {a}?|
Here the {a} {n} is {a}, and the {n} {v} it.|If the {n} is {a}, then its {n} {v} the {n}.|
{Name} wrote about the {n} and its {a} {n} in {year}.|We look at the {n} first and at the {a} {n} next.|
Note that the {n} {v} the {n} only for a {a} {n}.|So the {a} {n} of each {n} {v} the {n}.|
You may ask why the {n} {v} the {a} {n} at all.|I met {Name} over a {n} about the {a} {n}.|
Suppose a {n} {v} some {n}; what of the {a} {n}?|For {number} of them the {n} {v} a {n}, and the rest are {a}.|
The {n} {v} {number} times, as {Name} found with a {a} {n}.|Let us take a {a} {n} that {v} the {n}.|
One {n} {v} the {n}, hence the other {n} is {a} too.|It follows that a {n} with {number} of {n} is {a}.|
""".replace("\n", "")
    .strip("|")
    .split("|")
)
"""Sentences that every page shares, whatever it is about."""

WITH_FORMULA = (
    """
Here {f}, and the {n} {v} the {n}.|So we have {f} for the {a} {n}.|With {f} the {n} {v} the {a} {n}.|
{Name} gets {f} from the {n}.|If {f}, the {n} is {a}.|The {n} is {f}, where the {n} {v} the {n}.|
This gives {f} and a {a} {n}.|Compare {f} with the {n} of the {n}.|We write {f} for the {a} {n} of a {n}.
""".replace("\n", "")
    .strip("|")
    .split("|")
)
"""Sentences around a formula, on every page that has any: also of physics, finance, engineering, code and scores."""

CHINESE_GENERAL = Lexicon.parse("""时间 城市 朋友 问题 方法 结果 原因 部分 学生 老师 文章 图片 故事 家庭 公司 市场 办法 情况 例子 内容 地方 网站 读者
    | 需要 认为 介绍 提供 找到 使用 说明 影响 改变 包括 | 重要 简单 新的 不同 主要 常见 特别 有趣 完整 一般""")

CHINESE_MATHEMATICS = _lexicons(
    {
        "代数": "方程 函数 多项式 根 系数 不等式 数列 变量 定理 因式 矩阵 集合 公式 | 等于 满足 化简 求解 证明 | 实数 正整数 唯一 任意 线性 有理",
        "几何": "三角形 圆 角 平行线 面积 直径 垂线 中点 证明 坐标 椭圆 切线 斜边 | 相交 平分 等于 证明 垂直于 | 全等 相似 等腰 平行 直角 对称",
        "奥数": "棋盘 硬币 应用题 余数 苹果 竞赛 盒子 抽屉 规律 谜题 步骤 答案 | 移动 分成 染色 猜出 数出 | 奇数 偶数 最少 巧妙 相邻 连续",
    }
)

CHINESE_OTHER = _lexicons(
    {
        "物理": "能量 粒子 质量 速度 电场 温度 光谱 引力 方程 振动 电子 | 辐射 吸收 加速 等于 产生 | 热的 磁性 经典 量子 线性",
        "股票": "股市 基金 利率 投资者 收益 债券 函数 风险 银行 贷款 比率 | 上涨 下跌 支付 交易 | 年度 固定 净的 最少",
        "美食": "豆腐 面条 火锅 酱油 厨房 味道 蔬菜 米饭 苹果 步骤 | 炒 煮 切 加入 | 新鲜 麻辣 甜的 热的",
        "旅游": "景点 酒店 火车 古镇 海滩 门票 长城 导游 直径 | 到达 参观 预订 游览 | 美丽 安静 古老 便宜",
        "体育": "球队 比赛 进球 冠军 教练 联赛 得分 球员 角 竞赛 | 赢得 射门 防守 输给 | 激烈 领先 年轻 连续",
        "新闻": "部长 政府 经济 选举 警方 预算 会议 改革 集合 | 宣布 表示 批准 反对 | 国际 政治 紧急 联合",
    }
)

CHINESE_SENTENCES = (
    """
{a}的{n}{v}{n}的{n}。|当{n}{v}{n}时，{n}变得{a}。|{Name}认为，每个{a}的{n}都{v}{n}。|在{Place}，{n}{v}{n}和{a}的{n}。|因为{n}是{a}的，所以{n}{v}{n}。|
如果{n}{v}{n}，那么{n}就是{a}的。|我们先看{n}，再看{a}的{n}。|没有{a}的{n}，{n}就不会{v}{n}。|{Name}在{year}年写过{n}和{a}的{n}。|设{n}{v}{n}，{n}会怎样？|
其中有{number}个{n}{v}{n}，其余是{a}的。|请注意，{n}只{v}{a}的{n}。|这个{n}不是{n}，而是{a}的{n}。
""".replace("\n", "")
    .strip("|")
    .split("|")
)

CHINESE_WITH_FORMULA = (
    """
由{f}可知，{n}{v}{n}。|于是得到{f}，{n}是{a}的。|这里{f}，{n}{v}{a}的{n}。|若{f}，则{n}为{a}的{n}。
""".replace("\n", "")
    .strip("|")
    .split("|")
)
