"""Short texts of several kinds for scripts/tok_eval.py, all written for this project."""

from __future__ import annotations

_NEWS = """\
HARBOUR TOWN, March 14 -- The old ferry "Margaret Ellis" made its last crossing on Tuesday evening, 61 \
years after it first carried passengers across the bay. About 2,300 people, many of them regular \
commuters, stood in the rain along Pier 4 to see it off. "I met my wife on this boat," said Thomas \
Adeyemi, 74, a retired teacher who took the 7:15 every weekday for three decades. "You can't say that \
about a tunnel."

The city council voted 9-4 last autumn to replace the ferry with two electric shuttles, each of which \
holds 120 people and cuts the trip from 25 minutes to just under 11. Officials expect the change to save \
roughly $1.8 million a year and to lower the harbour's diesel emissions by a third. Critics aren't \
convinced: the shuttles won't take cars, and fares are set to rise from $2.75 to $3.50 on June 1.

"We've heard those concerns, and we're not ignoring them," Mayor Ingrid Castellanos told reporters. She \
added that a discount card would be offered to students, pensioners and anyone who lives on the eastern \
shore. What happens to the ship itself is still open. A museum in the north has shown interest; so has a \
restaurant owner, who'd like to moor it beside the fish market. For now it'll stay where it is, engines \
cold, its horn silent, while gulls take over the upper deck.
"""

_KOREAN = """\
할머니 댁은 기차역에서 버스로 사십 분쯤 더 들어가야 하는 작은 마을에 있었다. 여름 방학이 되면 나는 혼자 \
기차를 타고 그곳으로 갔다. 마당에는 오래된 감나무 한 그루가 서 있었고, 그 아래 평상에서는 늘 누군가가 \
낮잠을 자거나 콩을 까고 있었다. 할머니는 내가 도착하면 가장 먼저 우물물에 담가 둔 참외를 꺼내 주셨다.
"먼 길 오느라 힘들었지? 어서 앉아서 이것부터 먹어라."
저녁이면 온 동네에 밥 짓는 냄새가 퍼졌다. 우리는 모기장을 치고 나란히 누워 별을 세었다. 할머니는 별마다 \
이름이 있다고 하셨는데, 나중에 알고 보니 그 이름들은 모두 할머니가 지어낸 것이었다. 지금도 도시의 흐린 \
하늘을 올려다볼 때면, 나는 그 이름들을 하나씩 조용히 불러 본다.
"""

_CHINESE = """\
我家楼下有一间很小的书店，老板姓陈，已经在那里开了二十多年。书店没有招牌，门口只摆着一张旧木桌，上面堆满了\
别人不要的杂志。每到周末，附近的孩子都喜欢坐在地板上看书，陈老板从来不赶他们走，有时还会给他们泡一壶热茶。
有一次我问他：“这样做生意，能赚到钱吗？”他笑了笑，说：“书放在架子上，没有人看，才是真的亏本。”
后来城里开了许多大商场，买书也可以在网上完成，三天之内就送到家里。我以为这间书店很快就会关门，可是它一直都在。\
去年冬天下了一场大雪，我路过的时候，看见窗户里还亮着灯，几个孩子围着火炉，正听他讲故事。
"""

_CODE = '''\
from __future__ import annotations

import heapq
from dataclasses import dataclass, field


@dataclass(order=True)
class Task:
    priority: int
    name: str = field(compare=False)
    depends_on: list[str] = field(default_factory=list, compare=False)


def schedule(tasks: dict[str, Task]) -> list[str]:
    """Order tasks so that dependencies come first; ties go to the lower priority number."""
    waiting = {name: len(task.depends_on) for name, task in tasks.items()}
    ready = [task for task in tasks.values() if not task.depends_on]
    heapq.heapify(ready)
    order = []
    while ready:
        task = heapq.heappop(ready)
        order.append(task.name)
        for other in tasks.values():
            if task.name in other.depends_on:
                waiting[other.name] -= 1
                if waiting[other.name] == 0:
                    heapq.heappush(ready, other)
    if len(order) != len(tasks):  # some task still waits for itself
        raise ValueError(f"circular dependency among {sorted(set(tasks) - set(order))}")
    return order


if __name__ == "__main__":
    demo = {
        "test": Task(2, "test", ["build"]),
        "build": Task(1, "build", ["fetch"]),
        "fetch": Task(0, "fetch"),
    }
    print(" -> ".join(schedule(demo)))  # fetch -> build -> test
'''

_MATH = r"""
\section{A bound on the tail of a sum}

Let $X_1, X_2, \ldots, X_n$ be independent random variables with $\mathbb{E}[X_i] = 0$ and $|X_i| \le c$ for
all $1 \le i \le n$, and write $S_n = \sum_{i=1}^{n} X_i$.

\begin{lemma}\label{lem:mgf}
For every $\lambda \in \mathbb{R}$ we have $\mathbb{E}\bigl[e^{\lambda X_i}\bigr] \le e^{\lambda^2 c^2 / 2}$.
\end{lemma}
\begin{proof}
The function $x \mapsto e^{\lambda x}$ is convex, hence on $[-c, c]$ it lies below its chord:
\[
  e^{\lambda x} \;\le\; \frac{c + x}{2c}\, e^{\lambda c} + \frac{c - x}{2c}\, e^{-\lambda c} .
\]
Take expectations. The linear terms vanish and $\cosh(\lambda c) \le e^{\lambda^2 c^2/2}$ remains, since
$(2k)! \ge 2^k \, k!$ for all $k \in \mathbb{N}_0$.
\end{proof}

\begin{theorem}
For all $t > 0$,
\begin{equation}\label{eq:tail}
  \Pr\left( S_n \ge t \right) \;\le\; \exp\left( -\frac{t^2}{2 n c^2} \right) .
\end{equation}
\end{theorem}
\begin{proof}
By Markov's inequality, independence and Lemma~\ref{lem:mgf}, for each $\lambda > 0$,
\begin{align*}
  \Pr(S_n \ge t) &= \Pr\bigl(e^{\lambda S_n} \ge e^{\lambda t}\bigr)
    \le e^{-\lambda t} \prod_{i=1}^{n} \mathbb{E}\bigl[e^{\lambda X_i}\bigr]
    \le \exp\Bigl( \tfrac{1}{2} \lambda^2 n c^2 - \lambda t \Bigr) .
\end{align*}
The exponent is smallest at $\lambda = t / (n c^2)$, which gives~\eqref{eq:tail}.
\end{proof}
"""

_SCIENCE = """\
Coral reefs are built by animals only a few millimetres wide. Each polyp draws dissolved calcium and \
carbonate from sea water and lays down a cup of aragonite beneath itself; over thousands of years, the \
cups of countless generations become limestone. Most of the energy for this work comes from \
dinoflagellates that live inside the polyp's tissue. By photosynthesis they turn carbon dioxide into \
sugars and pass up to 90% of them to their host, which in return supplies shelter, nitrogen and \
phosphorus.

The partnership is sensitive to heat. When the water stays about 1 °C above the usual summer maximum for \
several weeks, the photosynthetic machinery of the algae starts to leak reactive oxygen species, and the \
coral expels its guests. What remains is transparent tissue over a white skeleton: the reef has \
bleached. If temperatures fall soon enough, the algae can return; otherwise the polyps starve, and \
seaweed overgrows the skeleton within months. Ocean acidification adds a second burden, because a lower \
pH reduces the concentration of carbonate ions (CO3 2-) from which aragonite is made.
"""

SAMPLES = {
    "news": _NEWS,
    "korean": _KOREAN,
    "chinese": _CHINESE,
    "code": _CODE,
    "math": _MATH,
    "science": _SCIENCE,
}
