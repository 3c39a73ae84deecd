"""The report's page: style and markup, as a Jinja template.

In Python rather than in a file of its own, because a Flower app bundle carries no template files.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1a222c; --muted: #5a6573; --paper: #ffffff; --panel: #f4f6f8; --rule: #d5dbe2; --link: #1c5aa0;
  --good: #17663a; --bad: #a02020; --shade: #1c5aa0;
  --plot-ink: #1a222c; --plot-grid: #ccd3db;
  --plot-0: #4a90c9; --plot-1: #a9b4bf; --plot-2: #17477f; --plot-3: #d98f1f; --plot-4: #2b8a78; --plot-5: #e3e8ed;
  --plot-6: #7d4fa0; --plot-7: #a5455f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e3e8ee; --muted: #9aa6b4; --paper: #14191f; --panel: #1d242c; --rule: #343e49; --link: #7db4ee;
    --good: #6cc592; --bad: #f08a8a; --shade: #7db4ee;
    --plot-ink: #e3e8ee; --plot-grid: #3a444f;
    --plot-0: #6aaede; --plot-1: #77838f; --plot-2: #3f7fcb; --plot-3: #e3a548; --plot-4: #49b09b; --plot-5: #2c3540;
    --plot-6: #a67fc9; --plot-7: #d07189;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
}
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1, h2 { font-family: Charter, "Iowan Old Style", Cambria, Georgia, "Liberation Serif", serif; line-height: 1.2; }
h1 { font-size: 2.1rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.45rem; margin: 3.2rem 0 .6rem; padding-top: .9rem; border-top: 2px solid var(--ink); }
h3 { font-size: 1rem; margin: 1.8rem 0 .4rem; }
p, ul, dl { margin: .5rem 0 .9rem; max-width: 46rem; }
.lead { font-size: 1.15rem; line-height: 1.5; }
.muted, figcaption, caption, .note { color: var(--muted); font-size: .875rem; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; margin: 1.2rem 0 0; padding: 0;
  max-width: none; font-size: .9rem; }
.status { border-left: 5px solid var(--muted); background: var(--panel); padding: .8rem 1.1rem; margin: 1.2rem 0; }
.status.failed { border-color: var(--bad); }
.status p { margin: .2rem 0; overflow-wrap: anywhere; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .1rem 1.5rem;
  max-width: none;
  margin: 1.4rem 0; padding: .9rem 1.1rem; background: var(--panel); }
.facts dt { color: var(--muted); font-size: .8rem; margin-top: .3rem; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: .8rem 0 1.2rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; width: 100%; }
caption { text-align: left; padding: 0 0 .5rem; max-width: 46rem; }
th, td { padding: .4rem .7rem .4rem 0; text-align: right; vertical-align: top; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child, .left { text-align: left; }
th.left, td.left { text-align: left; }
thead th { font-weight: 600; border-bottom: 1.5px solid var(--ink); vertical-align: bottom; }
tbody th { font-weight: 600; }
tfoot td, tfoot th { font-weight: 600; border-bottom: 0; border-top: 1.5px solid var(--ink); }
td .was { color: var(--muted); white-space: nowrap; }
td .delta { display: block; font-size: .8rem; white-space: nowrap; }
.better { color: var(--good); } .worse { color: var(--bad); } .same, .unknown { color: var(--muted); }
.nowrap { white-space: nowrap; }
.wrap { overflow-wrap: anywhere; min-width: 14rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem 2.5rem;
  align-items: start; }
figure { margin: .8rem 0; min-width: 0; }
figure svg { display: block; width: 100%; max-width: 38rem; height: auto; }
figure svg text { font-family: inherit; }
.sample { border: 1px solid var(--rule); margin: 0 0 1rem; break-inside: avoid; }
.sample h3 { margin: 0; padding: .6rem .9rem; background: var(--panel); font-weight: 600; }
.sample dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); margin: 0;
  max-width: none; }
.sample dl div { padding: .5rem .9rem .7rem; }
.sample dt { color: var(--muted); font-size: .8rem; }
.sample dd { margin: 0; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: .6rem 0 1.2rem; }
summary { cursor: pointer; color: var(--link); font-size: .9rem; }
pre, code { font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
pre { background: var(--panel); padding: 1rem 1.1rem; overflow-x: auto; margin: .6rem 0; }
code { overflow-wrap: anywhere; }
@media (max-width: 34rem) { main { padding: 1.5rem 1rem 3rem; } h1 { font-size: 1.6rem; } body { font-size: 15px; } }
@media print {
  :root {
    color-scheme: light;
    --ink: #000; --muted: #444; --paper: #fff; --panel: #f4f4f4; --rule: #bbb; --link: #000; --good: #000; --bad: #000;
    --plot-ink: #000; --plot-grid: #bbb;
    --plot-0: #4a90c9; --plot-1: #a9b4bf; --plot-2: #17477f; --plot-3: #d98f1f; --plot-4: #2b8a78; --plot-5: #e3e8ed;
    --plot-6: #7d4fa0; --plot-7: #a5455f;
  }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  h2, h3, caption, summary { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  .scroll { overflow: visible; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ name }}: federation report</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<header>
<p class="muted">Federation report</p>
<h1>{{ name }}</h1>
{% if status == "failed" %}
<div class="status failed" role="alert">
<p><strong>This run failed{% if done %} after {{ done }} of {{ planned }} rounds{% endif %}.</strong></p>
<p>{{ reason }}</p>
</div>
{% elif status != "completed" %}
<div class="status" role="status">
<p><strong>This run has not ended.</strong> {{ done }} of {{ planned }} rounds were done when its last line was written,
{{ newest|utc }}. All numbers below are as of then.</p>
</div>
{% endif %}
{% for sentence in headline %}
<p class="lead">{{ sentence }}</p>
{% endfor %}
<dl class="facts">
{% for key, value in facts %}
<div><dt>{{ key }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
<nav aria-label="On this page"><ul>
{% for anchor, title in contents %}
<li><a href="#{{ anchor }}">{{ title }}</a></li>
{% endfor %}
</ul></nav>
</header>

<section>
<h2 id="result">Result: base model and federation</h2>
{% if results %}
<div class="scroll" tabindex="0" role="region" aria-label="Scores before and after">
<table>
<caption>Scores on held-out rows, which no training has seen: the base model's, then the federation's
{% if any_trained %}newest{% endif %} model's.</caption>
<thead><tr><th scope="col">Measured at</th>
{% for score in scores %}
<th scope="col">{{ score.title }}<br><span class="muted">{{ "lower" if score.lower_is_better else "higher" }} is
better</span></th>
{% endfor %}
</tr></thead>
<tbody>
{% for line in results %}
<tr><th scope="row">{{ "server's own set" if line.who == "server" else line.who }}<br>
<span class="muted">{{ line.examples|whole }} rows{% if line.generated %}, {{ line.generated }} answered{% endif %}
{% if line.version and line.version != newest_version %}, after round {{ line.version }}{% endif %}</span></th>
{% for score in scores %}
{% set change = line.changes.get(score.name) %}
<td>{% if change %}<span class="was">{{ change.before|score }} →</span>
<strong>{{ change.after|score }}</strong>
<span class="delta {{ change.verdict }}">{{ change|delta }}</span>{% else %}–{% endif %}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
<ul class="note">
{% for score in scores %}
<li>{{ score.title }}: {{ score.meaning }}.</li>
{% endfor %}
{% if fewest_answers %}
<li>{{ of_answers|join(", ") }}: of answers that the model wrote itself. With {{ fewest_answers }} answers, one of
them weighs {{ "%.1f"|format(100 / fewest_answers) }} % of a score: small differences may be chance.</li>
{% endif %}
</ul>
{% if confusion %}
<div class="scroll" tabindex="0" role="region" aria-label="Confusion matrix"><table>
<caption>Rows of the server's own set by right label (lines) and by the label that the newest model chose
(columns).</caption>
<thead><tr><th scope="col">Right label</th>{% for label in confusion %}<th scope="col">{{ label }}</th>{% endfor %}</tr>
</thead>
<tbody>
{% for label, counts in confusion.items() %}
<tr><th scope="row">{{ label }}</th>{% for count in counts %}<td>{{ count|whole }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% else %}
<p>Nothing was evaluated.</p>
{% endif %}
</section>

<section>
<h2 id="curves">Round by round</h2>
{% if figures.curves %}
<div class="pair">
{% for svg, caption in figures.curves %}
<figure>{{ svg }}<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
</div>
<details><summary>The numbers behind the curves</summary>
{% for score, lines, versions in curve_tables %}
<div class="scroll" tabindex="0" role="region" aria-label="{{ score.title }} by round"><table>
<caption>{{ score.title }} by rounds of training behind the model</caption>
<thead><tr><th scope="col">Measured at</th>{% for v in versions %}<th scope="col">{{ v }}</th>{% endfor %}</tr></thead>
<tbody>
{% for who, values in lines.items() %}
<tr><th scope="row">{{ who }}</th>{% for v in versions %}<td>{{ values.get(v)|score }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
</details>
{% else %}
<p>No round was evaluated.</p>
{% endif %}
</section>

<section>
<h2 id="costs">Time and bytes</h2>
{% if costs %}
<div class="pair">
<figure>{{ figures.time }}<figcaption>{{ time_caption }}</figcaption></figure>
<div>
<div class="scroll" tabindex="0" role="region" aria-label="Bytes per site"><table>
<caption>Bytes of tensors sent to and by each site. {{ sent }}</caption>
<thead><tr><th scope="col">Site</th><th scope="col">Rounds</th><th scope="col">Down</th><th scope="col">Up</th>
<th scope="col">Down per round</th><th scope="col">Up per round</th></tr></thead>
<tbody>
{% for cost in costs %}
<tr><th scope="row">{{ cost.who }}</th><td>{{ cost.rounds }}</td><td>{{ cost.down|size }}</td>
<td>{{ cost.up|size }}</td><td>{{ (cost.down / cost.rounds)|size }}</td><td>{{ (cost.up / cost.rounds)|size }}</td></tr>
{% endfor %}
</tbody>
<tfoot><tr><th scope="row">All</th><td></td><td>{{ costs|sum(attribute="down")|size }}</td>
<td>{{ costs|sum(attribute="up")|size }}</td><td></td><td></td></tr></tfoot>
</table></div>
<div class="scroll" tabindex="0" role="region" aria-label="Seconds per site"><table>
<caption>Seconds of the whole run, by what they were spent on.</caption>
<thead><tr><th scope="col">Site</th>
{% for p in phases %}<th scope="col">{{ p|capitalize }}</th>{% endfor %}</tr></thead>
<tbody>
{% for cost in costs %}
<tr><th scope="row">{{ cost.who }}</th>{% for p in phases %}<td>{{ cost.seconds.get(p)|seconds }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
</div>
</div>
<ul class="note">
<li>Download and upload include queueing and, where a site starts a process for each message, its start; they are taken
from two machines' clocks and are only as good as these agree.</li>
<li>Wait: from a site's own answer to the end of the round, that is for the other sites and the server.</li>
</ul>
<details><summary>Every round and site</summary>
<div class="scroll" tabindex="0" role="region" aria-label="Every round and site"><table>
<caption>Training loss is of the site's own rows, first and last step; phases in seconds.</caption>
<thead><tr><th scope="col">Round</th><th scope="col" class="left">Site</th><th scope="col">First loss</th>
<th scope="col">Last loss</th><th scope="col">Steps</th><th scope="col">Tokens/s</th><th scope="col">Memory</th>
<th scope="col">Down</th><th scope="col">Up</th>
{% for p in phases %}<th scope="col">{{ p|capitalize }}</th>{% endfor %}</tr></thead>
<tbody>
{% for record in trainings %}
{% set t = record.get("train", {}) %}{% set b = record.get("bytes", {}) %}{% set s = record.get("seconds", {}) %}
<tr><td>{{ record.round }}</td><th scope="row" class="left">{{ record.client }}</th>
<td>{{ t.get("loss_first")|score }}</td><td>{{ t.get("loss_last")|score }}</td><td>{{ t.get("steps")|whole }}</td>
<td>{{ t.get("tokens_per_second")|whole }}</td>
<td class="nowrap">{{ (t.get("peak_memory_bytes") or none)|size }}</td>
<td class="nowrap">{{ b.get("down")|size }}</td><td class="nowrap">{{ b.get("up")|size }}</td>
{% for p in phases %}<td>{{ s.get(p)|seconds }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
</details>
{% else %}
<p>No site has finished a round.</p>
{% endif %}
</section>

<section>
<h2 id="answers">The same questions, before and after</h2>
{% if samples %}
<p>From the server's own evaluation set. No row of any site's shard is on this page.</p>
{% for sample in samples %}
<article class="sample">
<h3 class="text">{{ sample.prompt }}</h3>
<dl>
{% for key, title in (("expected", "Expected"), ("before", "Base model"), ("after", "Federation")) %}
<div><dt>{{ title }}{% if key != "expected" and sample[key].strip() == sample.expected.strip() %}
<strong class="better">= expected</strong>{% endif %}</dt>
<dd class="text">{% if sample[key].strip() %}{{ sample[key] }}
{%- else %}<em class="muted">(empty)</em>{% endif %}</dd></div>
{% endfor %}
</dl>
</article>
{% endfor %}
{% else %}
<p>{{ "The server has no questions of its own to show." if status == "completed"
  else "Answers are compared at the end of a run." }}</p>
{% endif %}
</section>

{% if diagnostics %}
<section>
<h2 id="drift">What the updates looked like</h2>
<p>Per group of layers and round, taken while the updates were combined. A darker cell is a larger number of its
table.</p>
{% for table in diagnostics %}
<div class="scroll" tabindex="0" role="region" aria-label="{{ table.title }}"><table>
<caption><strong>{{ table.title }}</strong>{% if table.meaning %}: {{ table.meaning }}{% endif %}</caption>
<thead><tr><th scope="col">Layers</th>
{% for n in table.rounds %}<th scope="col">Round {{ n }}</th>{% endfor %}</tr></thead>
<tbody>
{% for group, cells in table.lines %}
<tr><th scope="row">{{ group }}</th>
{% for value, shade in cells %}
<td style="background: color-mix(in srgb, var(--shade) {{ shade }}%, transparent)">{{ value|precise }}</td>
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
</section>
{% endif %}

<section>
<h2 id="sites">Sites</h2>
{% if sites %}
{% set noised = sites|selectattr("privacy")|list %}
<div class="scroll" tabindex="0" role="region" aria-label="Sites and rounds"><table>
<caption>Who took part in which round. ✓ trained and counted; “–” not asked.</caption>
<thead><tr><th scope="col">Site</th><th scope="col">Training rows</th><th scope="col">Held-out rows</th>
<th scope="col" class="left">Device</th>
{% if noised %}<th scope="col" class="left">Differential privacy</th>{% endif %}
{% for n in rounds %}<th scope="col">Round {{ n }}</th>{% endfor %}</tr></thead>
<tbody>
{% for site in sites %}
<tr><th scope="row">{{ site.who }}</th><td>{{ site.rows|whole }}</td><td>{{ site.held_out|whole }}</td>
<td class="left">{{ site.device }}</td>
{% if noised %}<td class="left">{{ site.privacy or "no noise" }}</td>{% endif %}
{% for n in rounds %}
{% set state = site.rounds[n] %}
<td{% if state in ("failed", "refused") %} class="worse"{% endif %}>
{%- if state == "trained" %}<span role="img" aria-label="trained">✓</span>
{%- elif state == "absent" %}<span role="img" aria-label="not asked">–</span>
{%- elif state == "asked" %}no answer yet
{%- else %}{{ state }}{% endif %}</td>
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% else %}
<p>No site joined.</p>
{% endif %}
<h3>Refusals and failures</h3>
{% if problems %}
<div class="scroll" tabindex="0" role="region" aria-label="Refusals and failures"><table>
<thead><tr><th scope="col">Time</th><th scope="col">Round</th><th scope="col" class="left">Site</th>
<th scope="col" class="left">What</th><th scope="col" class="left">Reason</th></tr></thead>
<tbody>
{% for problem in problems %}
<tr><td class="nowrap">{{ problem.time|utc }}</td><td>{{ problem.round|whole }}</td>
<td class="left">{{ problem.who }}</td>
<td class="left nowrap">{{ problem.what }}</td><td class="left wrap">{{ problem.reason }}</td></tr>
{% endfor %}
</tbody></table></div>
{% else %}
<p>None.</p>
{% endif %}
</section>

<section>
<h2 id="settings">Settings and versions</h2>
<div class="pair">
<div class="scroll" tabindex="0" role="region" aria-label="Versions and machine"><table>
<caption>The server's software and machine.</caption>
<tbody>
{% for key, value in versions %}
<tr><th scope="row">{{ key }}</th><td class="left wrap">{{ value }}</td></tr>
{% endfor %}
</tbody></table></div>
<div class="scroll" tabindex="0" role="region" aria-label="Digests"><table>
<caption>SHA-256 digests. Two parties that see the same digest hold the same thing.</caption>
<tbody>
{% for key, value in digests %}
<tr><th scope="row" class="nowrap">{{ key }}</th><td class="left"><code>{{ value }}</code></td></tr>
{% endfor %}
</tbody></table></div>
</div>
<h3>Federation file</h3>
<p class="muted">As used: with all defaults filled in and paths made absolute.</p>
<pre tabindex="0">{{ settings }}</pre>
{% if trained %}
<details><summary>The {{ trained|length }} trained tensors</summary>
<div class="scroll" tabindex="0" role="region" aria-label="Trained tensors"><table>
<thead><tr><th scope="col">Name</th><th scope="col">Shape</th></tr></thead>
<tbody>
{% for name, shape in trained.items() %}
<tr><td><code>{{ name }}</code></td><td>{{ shape|join(" × ") }}</td></tr>
{% endfor %}
</tbody></table></div>
</details>
{% endif %}
</section>
</main>
</body>
</html>
"""
