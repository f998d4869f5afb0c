"""Laws of learned tables: the history form, the family, its Jacobian, the least-squares method and the search."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffusion
from diffusion import schedules, sealed, solvers, testbeds, timesteps
from diffusion.commands import learn, learned, samplers
from diffusion.commands.opening import Opened
from diffusion.errors import InputError
from diffusion.guidance import Guidance
from diffusion.learning import least_squares, paths, rollout, searches, starts, tables
from diffusion.learning.family import GROUPS, SCOPES, Family
from diffusion.learning.losses import LOG, Loss
from diffusion.solvers.history import from_table, to_table

LINEAR, COSINE = schedules.linear(), schedules.cosine()
DETERMINISTIC = {
    "ddim": {},
    "dpm_solver": {"order": 2},
    "dpm_solver_pp": {"order": 3},
    "dpm_solver_pp_singlestep": {"order": 2},
    "unipc": {"order": 3},
    "deis": {"order": 3},
    "lms": {"order": 4},
    "ipndm": {"order": 4},
    "plms": {"order": 4},
    "pndm": {},
    "heun": {},
}
MEANS = np.stack([np.linspace(-0.8, 0.5, 6), np.linspace(0.6, -0.4, 6), np.sin(np.arange(6.0))]).reshape(3, 2, 3)
BED = testbeds.mixture(LINEAR, [0.5, 0.3, 0.2], MEANS, [0.04, 0.02, 0.05])


def noises(count, seed=0, shape=(2, 3)):
    return rollout.Noises(np.random.default_rng(seed).normal(size=(count, *shape)))


def family(solver=solvers.unipc, groups=GROUPS, schedule=LINEAR, **options):
    return Family(schedule, solver, np.array([950.0, 610.0, 260.0, 0.0]), options, groups)


# ------------------------------------------------------------------------------------------------------- history form


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_the_history_form_of_a_solver_is_the_same_sampler(name, steps):
    table = solvers.SOLVERS[name](LINEAR, timesteps.uniform(LINEAR, steps), **DETERMINISTIC[name])
    again = to_table(from_table(table), table.name)
    assert again.num_registers <= table.nfe
    for variance in (0.05, 1.0):
        wanted, found = (solvers.gaussian_moments(each, 0.3, variance) for each in (table, again))
        np.testing.assert_allclose(found, wanted, rtol=1e-7)  # from T, where eps solvers weigh 1 / a


def test_a_sampler_that_draws_noise_has_no_history_form():
    with pytest.raises(InputError, match="draws noise"):
        from_table(solvers.ddpm(LINEAR, timesteps.uniform(LINEAR, 3)))


def test_registers_hold_each_estimate_only_while_it_is_needed():
    first_order = to_table(from_table(solvers.ddim(LINEAR, timesteps.uniform(LINEAR, 9))), "one")
    assert first_order.num_registers == 1
    assert np.array_equal(first_order.update, solvers.ddim(LINEAR, timesteps.uniform(LINEAR, 9)).update)


# ------------------------------------------------------------------------------------------------------------- family


@pytest.mark.parametrize("base", starts.BASES)
@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_corrections_of_zero_are_the_hand_made_solver_bit_for_bit(base, schedule):
    for tau in (timesteps.uniform(schedule, 5), timesteps.log_snr(schedule, 5, start=0.985)):
        solver = starts.solver(base)
        of_family = Family(schedule, solver, np.asarray(tau, np.float64))
        found = of_family.history(np.zeros(of_family.size))
        for ours, theirs in zip(found, from_table(solver(schedule, tau)), strict=True):
            assert np.array_equal(ours, theirs)


def test_history_weights_keep_a_constant_estimate():
    of_family = family(groups=("grid", "times", "history"), order=2)
    moved = to_table(of_family.history(np.random.default_rng(1).normal(size=of_family.size)), "moved")
    # The estimate of data at one point is that point, whatever x is, and so is the last x of every table of this kind.
    mean, _ = solvers.gaussian_moments(moved, 0.7, 1e-14, start=(0.4, 0.0))
    np.testing.assert_allclose(mean, 0.7, atol=1e-9)


@pytest.mark.parametrize("group", ["history", "sums", "last"])
def test_a_group_of_corrections_moves_its_own_rows(group):
    of_family = family(groups=(group,), order=2)
    start, moved = (of_family.history(np.full(of_family.size, size)) for size in (0.0, 0.3))
    changed = np.any(start.weights != moved.weights, axis=1) | (start.keep != moved.keep)
    assert changed.tolist() == {"history": [False, True, False], "sums": [True, True, False]}.get(
        group, [False, False, True]
    )


@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_moves_only_what_it_names(scope):
    of_family = family(groups=SCOPES[scope], order=2)
    start, moved = of_family.history(np.zeros(of_family.size)), of_family.history(np.full(of_family.size, 0.3))
    same_grid = np.array_equal(start.tau, moved.tau) and np.array_equal(start.t, moved.t)
    assert same_grid == (scope == "coefficients")
    of_solver = from_table(solvers.unipc(LINEAR, moved.tau, order=2))
    assert np.array_equal(moved.weights, of_solver.weights) == (scope == "tau")


# ----------------------------------------------------------------------------------------------------------- Jacobian


GUIDED = Guidance(scale=2.0, rule="apg:norm=0", null=None)
GUIDED_PLUS = Guidance(scale=0.7, rule="cfg++")


def _conditional(params, x, t, cond=None):
    """A network whose answer depends on its condition, smoothly."""
    return BED.apply_fn(params, x, t) * (1 + 0.2 * cond.reshape(-1, 1, 1))


@pytest.mark.parametrize(
    ("guidance", "clip"),
    [(None, "none"), (None, "keep_eps"), (GUIDED, "none"), (GUIDED_PLUS, "none")],
    ids=["plain", "keep_eps", "apg with momentum", "cfg++"],
)
def test_the_jacobian_equals_finite_differences(guidance, clip):
    with jax.enable_x64(True):
        batch = noises(3)
        if guidance is not None:
            batch = batch._replace(cond=np.array([0.5, 1.0, -1.0]), null=np.zeros(3))
        network = BED.apply_fn if guidance is None else _conditional
        asked = rollout.Asked(BED.params, guidance, network, "eps", diffusion.denoiser.Options(clip))
        of_family = family(order=2)
        at = 0.1 * np.random.default_rng(2).normal(size=of_family.size)
        x, jacobian = rollout.run_with_jacobian(asked, of_family.history(at), of_family.derivative(at), batch)
        np.testing.assert_allclose(x, rollout.run(asked, of_family.history(at), batch), rtol=1e-12)
        for number, direction in enumerate(np.eye(of_family.size)):
            ends = [rollout.run(asked, of_family.history(at + way * 1e-5 * direction), batch) for way in (1, -1)]
            np.testing.assert_allclose(jacobian[number], (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-6)


def test_a_history_runs_as_its_table_does():
    with jax.enable_x64(True):
        batch = noises(4)
        asked = rollout.Asked(BED.params, None, BED.apply_fn)
        history = family(order=2).history(0.1 * np.ones(family().size))
        shared = {"x_init": jnp.asarray(batch.x), "clip": "none"}
        key = jax.random.key(0)
        wanted = diffusion.sample(BED.apply_fn, BED.params, to_table(history, "any"), key, 4, (2, 3), **shared)
        np.testing.assert_allclose(rollout.run(asked, history, batch), wanted, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------------ least squares


def test_least_squares_finds_the_minimum_of_a_linear_problem_and_ignores_outliers():
    rng = np.random.default_rng(0)
    design, truth = rng.normal(size=(40, 5, 3)), np.array([1.0, -2.0, 0.5])
    observed = design @ truth
    observed[:3] += 50  # samples that end elsewhere

    def errors(numbers):
        return np.mean((design @ numbers - observed) ** 2, axis=1)

    def equations(numbers, weights):
        residuals = design @ numbers - observed
        normal = np.einsum("n,nrp,nrq->pq", weights, design, design) / residuals.size
        return normal, np.einsum("n,nrp,nr->p", weights, design, residuals) / residuals.size

    problem = least_squares.Problem(errors, equations, np.zeros(3))
    fit = least_squares.begin(problem, np.zeros(3))
    for _ in range(30):
        fit = least_squares.iterate(problem, fit)
    np.testing.assert_allclose(fit.numbers, truth, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------- search


def make_bed(testbed, schedule, shape, exact, count=32, loss=LOG):
    batches = [noises(count, seed, shape) for seed in (0, 1)]
    asked = rollout.Asked(testbed.params, None, testbed.apply_fn)
    targets = [np.asarray(exact(batch.x)) for batch in batches]
    return tables.Bed(asked, schedule, (batches[0],), (batches[1],), (targets[0],), (targets[1],), loss)


def search_to_the_end(bed, calls, groups=GROUPS):
    search = tables.begin(bed, calls, groups)
    while search.current is not None:
        search = tables.advance(bed, search)
    return search


def test_a_table_learned_for_gaussian_data_reaches_the_exact_flow():
    # The exact flow is affine in x, and so is a table of two calls: the optimum has no error at all.
    testbed = testbeds.gaussian(LINEAR, 0.2, 0.3)
    bed = make_bed(testbed, LINEAR, (4,), lambda x: testbeds.gaussian_flow(LINEAR, 0.2, 0.3, x, 1000))
    search = search_to_the_end(bed, 2)
    assert np.sqrt(np.mean(bed.errors(tables.result(bed, search), held=True))) < 0.01

    def moments(history):  # the sampler is affine, and a learned one tells the network other times than its levels
        at_0, at_1 = np.asarray(rollout.run(bed.asked, history, rollout.Noises(np.array([[0.0] * 4, [1.0] * 4]))))
        return at_0[0], (at_1 - at_0)[0] ** 2

    mean, variance = moments(tables.result(bed, search))
    assert mean == pytest.approx(0.2, abs=0.01)
    assert variance == pytest.approx(0.3, rel=0.01)
    best = min(abs(moments(history)[1] - 0.3) for *_, history in starts.hand_made(LINEAR, 2))
    assert abs(variance - 0.3) < 0.3 * best


def test_a_learned_table_is_never_worse_on_held_out_noise_than_the_best_hand_made_one():
    with jax.enable_x64(True):
        bed = make_bed(
            BED, LINEAR, (2, 3), lambda x: testbeds.ode_solution(*BED, LINEAR, x, 1000, tolerance=1e-6), count=16
        )
        search = search_to_the_end(bed, 3)
        found = bed.loss(bed.errors(tables.result(bed, search), held=True))
        hand = min(bed.loss(bed.errors(h, held=True)) for *_, h in starts.hand_made(LINEAR, 3))
        assert search.hand_made == pytest.approx(hand)
        assert found == pytest.approx(search.leader.best_loss)
        assert found < hand - 0.5


LOSSES = {
    "log": Loss(),
    "mse": Loss(floor=None),
    "l1": Loss(absolute=True, floor=None),
    "features": Loss(np.array([[1.0, -2], [0.2, 0.1], [1.5, -1], [0.0, 1]]), lambda params, x: jnp.tanh(x @ params)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_search_that_was_cut_off_goes_on_with_the_same_bits(name):
    testbed, exact = testbeds.gaussian(COSINE, 0.2, 0.3), lambda x: testbeds.gaussian_flow(COSINE, 0.2, 0.3, x, 1000)
    bed = make_bed(testbed, COSINE, (4,), exact, count=8, loss=LOSSES[name])
    whole = resumed = tables.begin(bed, 2, GROUPS)
    for _ in range(4):
        whole = tables.advance(bed, whole)
        resumed = searches.from_record(json.loads(json.dumps(searches.to_record(resumed))))
        resumed = tables.advance(bed, resumed)
    assert json.dumps(searches.to_record(whole)) == json.dumps(searches.to_record(resumed))


def gaussian_search():
    testbed = testbeds.gaussian(LINEAR, 0.2, 0.3)
    bed = make_bed(testbed, LINEAR, (4,), lambda x: testbeds.gaussian_flow(LINEAR, 0.2, 0.3, x, 1000), count=4)
    return bed, tables.begin(bed, 2, GROUPS)


def test_a_search_whose_samples_diverged_on_held_out_noise_is_read_as_it_was(tmp_path):
    _, search = gaussian_search()
    first = search.trials[0]
    search = search._replace(trials=(first._replace(losses=(*first.losses, (-1.0, np.inf))), *search.trials[1:]))
    sealed.write(tmp_path / "search.json", searches.to_record(search))
    again = searches.from_record(sealed.read(tmp_path / "search.json"))
    assert again.trials[0].losses == search.trials[0].losses


@pytest.mark.parametrize(
    "change",
    [
        {"start": ("ddim", "sections:counts=2")},
        {"best": np.zeros(1)},
        {"best": np.full(10, 41.0)},
        {"best_loss": np.nan},
        {"losses": ()},
    ],
    ids=str,
)
def test_a_search_of_a_stranger_is_refused(change):
    bed, search = gaussian_search()
    searches.check(search, bed, 2, GROUPS)
    first = search.trials[0]
    assert first.best.shape == (10,)  # so that what is refused above is its size
    altered = search._replace(trials=(first._replace(**change), *search.trials[1:]))
    with pytest.raises(ValueError, match="a trial "):
        searches.check(altered, bed, 2, GROUPS)
    for other in (search._replace(trials=()), search._replace(calls=3)):
        with pytest.raises(ValueError, match="another table"):
            searches.check(other, bed, 2, GROUPS)
    with pytest.raises(ValueError, match="another size"):  # from another number of noises
        searches.check(search, bed._replace(train=(*bed.train, *bed.held)), 2, GROUPS)


def test_hand_made_samplers_at_whose_times_guidance_does_not_act_are_left_out():
    bed, _ = gaussian_search()

    def apply_fn(params, x, t, cond=None):
        return bed.asked.apply_fn(params, x, t)

    # Only grids with a time in 100..900 are left; karras and log_snr of two steps go from T to 1.
    guidance = Guidance(scale=2.0, interval=(100, 900), reference_fn=apply_fn, reference_params=bed.asked.params)
    guided = bed._replace(asked=bed.asked.replace(guidance=guidance, apply_fn=apply_fn))
    starts = {trial.start[1].partition(":")[0] for trial in tables.begin(guided, 2, GROUPS).trials}
    assert starts
    assert starts <= {"uniform", "quadratic"}


@pytest.mark.parametrize("name", LOSSES)
def test_the_equations_have_the_slope_of_the_loss(name):
    loss = LOSSES[name]
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        samples, targets, direction = rng.normal(size=(3, 5, 4))

        def errors(step):
            return np.asarray(tables._errors(loss, samples + step * direction, targets))

        weights = loss.weights(errors(0.0))
        normal, slope = tables._sums(loss, samples, direction[None], targets, weights)
        # Half of the derivative, as J^T r is that of |r|^2.
        numeric = (loss.mean(errors(1e-5)) - loss.mean(errors(-1e-5))) / 2e-5
        np.testing.assert_allclose(2 * slope[0] / len(samples), numeric, rtol=1e-7)
        assert normal[0, 0] > 0


def test_a_table_learned_for_latents_by_absolute_errors_comes_near_the_exact_flow():
    testbed = testbeds.gaussian(LINEAR, 0.2, 0.3)

    def exact(x):
        return testbeds.gaussian_flow(LINEAR, 0.2, 0.3, x, 1000)

    for name in ("mse", "l1"):
        bed = make_bed(testbed, LINEAR, (4,), exact, count=16, loss=LOSSES[name])
        search = search_to_the_end(bed, 2)
        assert search.leader.best_loss < search.hand_made - 1, name


def test_losses_agree_where_they_are_the_same():
    errors = np.random.default_rng(0).uniform(0.1, 1, 9)
    plain, floored = Loss(floor=None), Loss(floor=1e6)
    assert floored.typical(errors) == pytest.approx(plain.typical(errors), rel=1e-5)
    assert plain.typical(np.full(3, 0.25)) == pytest.approx(np.log(0.25))
    small, large = np.full((1, 1), 1e-5), np.full((1, 1), 5.0)
    absolute = LOSSES["l1"]
    assert float(absolute.of(large)[0]) == pytest.approx(5, rel=1e-3)
    assert float(absolute.of(small)[0]) == pytest.approx(1e-10 / 2e-3, rel=1e-2)  # a square near 0
    assert plain.mean(np.array([1.0, np.inf])) == Loss().typical(np.array([np.nan])) == np.inf


@pytest.mark.filterwarnings("error")
def test_least_squares_ends_where_nothing_moves_the_errors():
    problem = least_squares.Problem(
        errors=lambda numbers: np.zeros(3),
        equations=lambda numbers, weights: (np.zeros((2, 2)), np.zeros(2)),
        corrections=np.zeros(2),
    )
    assert least_squares.iterate(problem, least_squares.begin(problem, np.zeros(2))).gain == 0


# -------------------------------------------------------------------------------------------------- tables of strangers


@pytest.mark.parametrize(
    "fact", [{"a": {}}, [[1]], np.nan, 10**400, [np.inf]], ids=["object", "nested", "nan", "huge", "infinite"]
)
def test_a_fact_that_is_no_plain_value_is_refused(fact):
    table = to_table(from_table(solvers.ddim(LINEAR, [1000, 500, 0])), "mine", {"clip": fact})
    with pytest.raises(InputError, match="its fact 'clip' is neither"):
        solvers.from_json(table.to_json())


def test_a_table_that_names_the_schedule_must_have_its_levels():
    history = family().history(np.zeros(family().size))
    facts = {"schedule": schedules.fingerprint(LINEAR)}
    told = history._replace(t=history.t * 0.9)  # the network may be told other times
    samplers.checked(LINEAR, to_table(told, "mine", facts), "it", "")
    for wrong in (history._replace(signal=-history.signal), history._replace(noise=history.noise * 1.01)):
        with pytest.raises(InputError, match="another noise schedule"):
            samplers.checked(LINEAR, to_table(wrong, "mine", facts), "it", "")


def test_the_table_for_this_guidance_comes_first_wherever_it_lies(tmp_path, monkeypatch):
    home, package = tmp_path / "home" / learned.FOLDER, tmp_path / "package"
    table = from_table(solvers.ddim(LINEAR, [1000, 500, 0]))
    for path in (home / "2-guidance3.json", package / "2.json"):
        path.parent.mkdir(parents=True)
        path.write_text(to_table(table, path.stem).to_json())
    monkeypatch.setattr(learned.pretrained, "tables", lambda name: package)
    opened = Opened("mine", home.parent, None, "digits")
    found = [learned.find(opened, 2, Guidance(scale=scale)).name for scale in (1.0, 3.0, 4.0)]
    assert found == ["2", "2-guidance3", "2-guidance3"]


def test_tables_for_different_guidance_have_different_names():
    guides = [Guidance(), Guidance(scale=2.0), Guidance(scale=2.0, rescale=0.5), Guidance(scale=2.0, rule="apg")]
    names = [learned.name_of(5, guide) for guide in guides] + [learned.name_of(5, guides[1], "ab" * 32)]
    assert len(set(names)) == len(names)
    assert names[:2] == ["5.json", "5-guidance2.json"]
    assert learned.name_of(5, Guidance(), "ab" * 32) == "5.json"  # nothing is pushed away from at scale 1


def test_two_solvers_that_are_one_sampler_are_looked_at_once():
    # At two calls the second-order steps of ddim's successors are the same numbers by other sums.
    found = [np.concatenate([np.ravel(part) for part in history]) for *_, history in starts.hand_made(COSINE, 2)]
    for one, other in itertools.combinations(found, 2):
        assert np.max(np.abs(one - other)) > 1e-9


def test_a_search_that_found_nothing_says_that_the_table_there_stays(tmp_path, capsys):
    search = tables.Search(5, GROUPS, -2.0, (tables.Trial(("ddim", "uniform"), None, np.zeros(1), -2.0, ()),))
    places = [tmp_path / name for name in ("5.json", "5.csv", ".5.search.json")]
    learn._finish(None, None, search, places, tmp_path)
    assert capsys.readouterr().out.endswith("hand-made sampler on held-out noise: no table\n")
    places[0].write_text("old")
    learn._finish(None, None, search, places, tmp_path)
    assert "5.json was learned before and stays" in capsys.readouterr().out
    assert places[0].read_text() == "old"


def test_facts_tell_apart_all_ways_to_ask_a_model():
    model = diffusion.pretrained.load().model
    guides = [Guidance(scale=2.0), Guidance(scale=2.0, interval=(1, 9)), Guidance(scale=2.0, rescale=0.5)]
    facts = [learned.facts_of(model, "", "none", guide) for guide in (Guidance(), *guides)]
    facts.append(learned.facts_of(model, "", "none", Guidance(), 0.9))
    assert len({json.dumps(of) for of in facts}) == len(facts)
    table = to_table(from_table(solvers.ddim(LINEAR, [1000, 0])), "mine", {"clip": "\x1b[31m", "threshold": 0.9})
    (first, second) = learned.notes(table, facts[0])
    assert first == "mine was learned at clip \\x1b[31m, and is used at none"
    assert second == "mine was learned at threshold 0.9, and is used at None"


def test_a_teacher_that_is_not_finite_is_refused():
    broken = jax.tree.map(lambda leaf: leaf * np.nan, BED.params)
    teacher = from_table(solvers.ddim(LINEAR, timesteps.uniform(LINEAR, 4)))
    with pytest.raises(InputError, match="teacher's samples are not finite"):
        tables.make_bed(rollout.Asked(broken, None, BED.apply_fn), LINEAR, teacher, (noises(2),), (noises(2, 1),))


# ----------------------------------------------------------------------------------------- grids by dynamic programming


@pytest.mark.parametrize("later", [1.0, 1.15])
@pytest.mark.parametrize("steps", [1, 2, 4, 6])
def test_the_path_of_least_cost_is_that_of_brute_force(steps, later):
    costs = np.random.default_rng(steps).uniform(0.1, 1, (7, 7))

    def total(path):
        return sum(later**k * costs[edge] for k, edge in enumerate(itertools.pairwise(path)))

    every = [[0, *middle, 6] for middle in itertools.combinations(range(1, 6), steps - 1)]
    assert paths.shortest(costs, steps, later) == min(every, key=total)


def test_the_costs_of_the_bound_are_its_terms():
    # For Gaussian data the squared error is the posterior variance, and the bound is that of `evaluation.bound`.
    schedule, variance = LINEAR, 0.3
    tau = np.array([1000.0, 700, 400, 100, 1, 0])
    a2, n2 = schedule.powers(tau[:-1])
    gamma = n2 / (a2 * variance + n2)  # E |eps_hat|^2 of the ideal network
    costs = paths.bound_costs(schedule, tau, gamma)
    posterior = variance * n2 / (a2 * variance + n2)
    snr = a2 / n2
    np.testing.assert_allclose(costs[1, 3], 0.5 * (snr[3] - snr[1]) * posterior[1], rtol=1e-9)
    assert costs[4, 5] == 0
    assert np.isinf(costs[0, 5])


def test_a_straight_path_costs_nothing_and_a_grid_descends_from_T_to_0():
    # Data at one point: eps is constant along the flow, and so every DDIM step ends on the path.
    testbed = testbeds.gaussian(LINEAR, 0.4, 1e-12)
    tau = paths.times(LINEAR, 0.985)
    costs = paths.path_costs(rollout.Asked(testbed.params, None, testbed.apply_fn), LINEAR, tau, noises(4))
    upper = costs[np.triu_indices(len(tau), 1)]
    assert np.max(upper) < 1e-4
    grid = paths.dp_path(LINEAR, 5, lambda times: costs, start=0.985)
    assert grid[0] == 985
    assert len(timesteps.check(LINEAR, grid)) == 6


def test_samples_of_a_schedule_that_preserves_no_variance_start_as_those_of_the_scan():
    flow = schedules.rectified_flow()
    testbed = testbeds.gaussian(flow, 0.2, 0.3, prediction="flow")
    with jax.enable_x64(True):
        asked = rollout.Asked(testbed.params, None, testbed.apply_fn, "flow")
        of_family = Family(flow, solvers.dpm_solver_pp, np.array([900.0, 500.0, 0.0]), {"order": 2})
        at = 0.2 * np.random.default_rng(0).normal(size=of_family.size)
        batch = noises(3)
        x, jacobian = rollout.run_with_jacobian(asked, of_family.history(at), of_family.derivative(at), batch)
        table = to_table(of_family.history(at), "any")
        start = np.hypot(table.signal[0], table.noise[0]) * batch.x
        shared = {"x_init": jnp.asarray(start), "prediction": "flow"}
        wanted = diffusion.sample(testbed.apply_fn, testbed.params, table, jax.random.key(0), 3, (2, 3), **shared)
        np.testing.assert_allclose(x, wanted, rtol=1e-9)
        for number, direction in enumerate(np.eye(of_family.size)):
            ends = [rollout.run(asked, of_family.history(at + way * 1e-5 * direction), batch) for way in (1, -1)]
            np.testing.assert_allclose(jacobian[number], (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("grid", "steps"), [(paths.dp_path, 61), (paths.dp_path, 0), (paths.dp_bound, 1)])
def test_a_wrong_number_of_steps_is_refused_before_anything_is_estimated(grid, steps):
    def never(tau):
        raise AssertionError("estimated")

    with pytest.raises(InputError, match=f"steps is {steps}"):
        grid(LINEAR, steps, never)
